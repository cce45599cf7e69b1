from int4_lora.integration.huggingface.quantised_modules import describe


def test_each_kind_of_module_and_reason_is_a_line():
    reasons = {
        "layers.0.q_proj": "it is FP8",
        "layers.1.q_proj": "the model has no such module",
        "layers.0.up_proj": "it is FP8",
        "layers.1.up_proj": "it is FP8",
        "layers.0.experts.11.w1": "it is FP8",
    }
    assert describe(reasons).splitlines() == [
        "  layers.0.q_proj: it is FP8",
        "  layers.1.q_proj: the model has no such module",
        "  layers.*.up_proj (2 modules): it is FP8",
        "  layers.0.experts.11.w1: it is FP8",
    ]
