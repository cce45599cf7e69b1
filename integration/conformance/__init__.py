"""The oracle for users: backends by name, golden files, a mixin for test suites, and peers.

Source: ``docs/conformance.md``.
"""

from int4_lora.integration.conformance.golden.check import check_golden
from int4_lora.integration.conformance.golden.write import write_golden
from int4_lora.integration.conformance.loading import load_backend

__all__ = ["check_golden", "load_backend", "write_golden"]
