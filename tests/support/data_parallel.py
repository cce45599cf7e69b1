"""Two processes that train a packed model with DistributedDataParallel over gloo."""

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["support.data_parallel", "peft", "int4_lora.integration.huggingface"]


def in_two_processes(folder, settings, tokens, scratch):
    """Train one step, each process on its half of the rows; return the result of each.

    Args:
        folder: the INT4 checkpoint.
        settings: arguments of PEFT's ``LoraConfig``.
        tokens: int64 ``[rows, length]``.
        scratch: an empty folder.
    """
    import torch

    CONTEXT.set_forkserver_preload(PRELOADED)
    children = [
        CONTEXT.Process(target=_train, args=(rank, folder, settings, tokens, scratch))
        for rank in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    return [torch.load(scratch / f"{rank}.pt") for rank in range(2)]


def _train(rank, folder, settings, tokens, scratch):
    import torch
    import torch.distributed as dist
    from peft import LoraConfig, get_peft_model

    from int4_lora.integration.huggingface import Int4Linear, load_packed

    store = dist.FileStore(str(scratch / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(rank)  # DDP gives both processes the adapter of the first
    model = get_peft_model(
        load_packed(folder, dtype=torch.float32), LoraConfig(**settings, init_lora_weights=False)
    )
    broadcast, sent = dist._broadcast_coalesced, []

    def counted(group, tensors, *rest):
        sent.append(sum(one.nbytes for one in tensors))
        return broadcast(group, tensors, *rest)

    dist._broadcast_coalesced = counted
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    start, sent[:] = sum(sent), []
    own = tokens.chunk(2)[rank]
    parallel(own, labels=own).loss.backward()
    result = {
        "gradients": {
            name: one.grad for name, one in model.named_parameters() if one.requires_grad
        },
        "bytes at the start": start,
        "bytes of a forward": sum(sent),
        "bytes of parameters": sum(one.nbytes for one in model.parameters()),
        "packed bytes": sum(
            one.nbytes
            for layer in model.modules()
            if isinstance(layer, Int4Linear)
            for one in layer.buffers()
        ),
    }
    torch.save(result, scratch / f"{rank}.pt")
    dist.destroy_process_group()
