"""A tiny model, and PEFT's LoRA on it, started in any of PEFT's ways."""

import warnings

import peft
import torch
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import nn


class Layers(nn.Module):
    """Two square layers and a head."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(2))
        self.head = nn.Linear(16, 8, bias=False)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


INPUT = torch.randn(32, 16, generator=torch.Generator().manual_seed(12))


def start(way):
    """Return PEFT's model with an untrained adapter."""
    torch.manual_seed(13)
    model = Layers()
    settings = {}
    if way == "lora_ga":
        settings["lora_ga_config"] = peft.tuners.lora.LoraGAConfig()
    elif way == "corda":
        settings["corda_config"] = CordaConfig()
    elif way == "eva":
        settings["eva_config"] = peft.EvaConfig(rho=2.0)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["0", "1"], init_lora_weights=way, **settings
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if way == "corda":
            preprocess_corda(model, config, run_model=lambda: model(INPUT))
        elif way == "lora_ga":
            from peft.tuners.lora.loraga import preprocess_loraga

            preprocess_loraga(model, config, lambda: model(INPUT).square().sum().backward())
        adapted = peft.get_peft_model(model, config)
        if way == "eva":
            peft.initialize_lora_eva_weights(
                adapted,
                dataloader=[INPUT] * 2,
                forward_fn=lambda model, batch: model(batch),
                prepare_model_inputs_fn=None,
                prepare_layer_inputs_fn=lambda inputs, batch, name: inputs[0],
                show_progress_bar=False,
            )
    return adapted


def train(adapted):
    """Take a few large steps, so that every trainable matrix differs from its start."""
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(4):
        optimiser.zero_grad()
        adapted(INPUT).square().mean().backward()
        optimiser.step()
