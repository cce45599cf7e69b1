"""oneshot, annotate, serve: vLLM reads what annotate wrote, and answers are right.

vLLM is in an environment of its own.
"""

import pytest

from int4_lora.integration import annotate
from support.served_beside import PYTHON, assert_served_right


@pytest.mark.skipif(PYTHON is None, reason="INT4_LORA_VLLM_PYTHON names no Python with vLLM")
def test_vllm_serves_what_was_annotated(quantised, tiny_adapters, tmp_path):
    annotated = annotate(quantised.folder)
    metadata = assert_served_right(quantised.folder, quantised.folder, tiny_adapters, tmp_path)
    assert metadata == [True, True, list(annotated.lora_target_modules)]
