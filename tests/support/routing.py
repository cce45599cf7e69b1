"""How clearly the routers of a model decide, and what they choose.

A token whose last chosen and first other expert score nearly alike may be given either in low
precision, in every implementation. No bound passes through that choice, so such tokens are counted
apart.
"""


def routers_of(model):
    """Return the modules of transformers that choose the experts."""
    modules = model.modules()
    return [each for each in modules if type(each).__name__.lower().endswith("topkrouter")]


def margins(scores, k):
    """Return by how much the k-th best score of each token exceeds the next: ``[tokens]``."""
    best = scores.sort(dim=-1, descending=True).values
    return best[:, k - 1] - best[:, k]


def group_scores(logits, bias, groups):
    """Return the score of each group of DeepSeek-V3's experts: its two best, added.

    Args:
        logits: of the router, ``[tokens, experts]``.
        bias: ``e_score_correction_bias``, ``[experts]``.
        groups: the number of groups.
    """
    scores = logits.sigmoid() + bias
    return scores.unflatten(-1, (groups, -1)).topk(2, dim=-1).values.sum(-1)


class Routing:
    """Records what the only router of a model decides in its next forward pass.

    Args:
        model: the model, with PEFT's adapters or without.

    Attributes:
        scores: of what is chosen among, experts or groups of them: float64 ``[tokens, choices]``.
        k: how many of them are chosen.
        experts: the chosen experts in ascending order, ``[tokens, k]``.
    """

    def __init__(self, model):
        (router,) = routers_of(model)
        self.hook = router.register_forward_hook(self._record)

    def _record(self, router, args, result):
        logits, _, experts = result
        self.scores, self.k = logits.double(), router.top_k
        self.experts = experts.sort(dim=-1).values
        if hasattr(router, "num_group"):
            # every expert of a chosen group is chosen: the choice of groups is the only decision
            size = router.num_experts // router.num_group
            assert router.top_k == router.topk_group * size
            bias = router.e_score_correction_bias.double()
            self.scores = group_scores(self.scores, bias, router.num_group)
            self.k = router.topk_group
        self.hook.remove()
