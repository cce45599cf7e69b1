"""The log-probabilities that a served model is held against: transformers and PEFT in float64."""

import torch

from int4_lora.integration.checkpoint.open import open_checkpoint
from int4_lora.integration.demo.models import Float64Inside, peft_model, peft_name

FLOOR = 0.02  # nats, beside twice the error of transformers in the same dtype


def truth_and_allowed(model, folders, prompts):
    """Return the true log-probabilities, and how far from them a served model may be.

    Returns:
        float64 ``[1 + adapters, prompts, tokens]``, the base first; and the number of nats.
    """
    truth = peft_logprobs(model, folders, prompts, torch.float64)
    low_precision = peft_logprobs(model, folders, prompts, torch.bfloat16)
    allowed = 2 * (low_precision - truth).abs().amax() + FLOOR
    return truth, allowed


def peft_logprobs(model, folders, prompts, dtype):
    """Return the log-probabilities of each prompt's tokens by transformers and PEFT."""
    peft = peft_model(open_checkpoint(model), folders, dtype)
    tokens, rows = torch.tensor(prompts), []
    for row in range(-1, len(folders)):
        if row >= 0:
            peft.set_adapter(peft_name(row))
        with torch.no_grad():
            if row < 0 and folders:
                with peft.disable_adapter():
                    logits = _logits(peft, tokens, dtype)
            else:
                logits = _logits(peft, tokens, dtype)
        each = logits[:, :-1].double().log_softmax(-1)
        rows.append(each.gather(2, tokens[:, 1:, None])[:, :, 0])
    return torch.stack(rows)


def _logits(model, tokens, dtype):
    if dtype == torch.float64:
        with Float64Inside():
            return model(tokens).logits
    return model(tokens).logits
