"""Models compiled block by block: in place, equal to eager, and refused where a model computes between its blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmoe_compiler as lmoe
from lmoe_compiler.blocks import _blocks, _refuse_work_between
from lmoe_compiler.errors import InvalidOption, MixesTokens
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.models.linear_moe import LinearMoEForCausalLM

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=16, num_layers=2, layer_pattern="LN", num_heads=2, num_kv_heads=1,
    head_dim=8, linear_heads=2, key_dim=4, value_dim=4, num_experts=4, top_k=2, expert_size=8,
    shared_expert_size=8,
)  # fmt: skip


def test_blocks_are_compiled_in_place_and_equal_eager():
    torch.manual_seed(0)
    whole, model = LinearMoEForCausalLM(CONFIG), LinearMoEForCausalLM(CONFIG)
    model.load_state_dict(whole.state_dict())
    assert lmoe.compile_blocks(model, inner="eager") is model
    assert model.state_dict().keys() == whole.state_dict().keys()
    ids, labels = torch.randint(0, 32, (2, 2, 7))
    for _ in range(2):
        whole(ids, labels).loss.backward()
        model(ids, labels).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole.get_parameter(name).grad)
    assert model(ids).loss is None


def test_our_models_only_hand_values_from_block_to_block():
    model = LinearMoEForCausalLM(CONFIG)
    blocks = dict(_blocks(model))
    assert list(blocks) == ["embed", "layers.0", "layers.1", "norm", "lm_head", "outputs"]
    _refuse_work_between(model, blocks)


class Between(nn.Module):
    """A model that does `work` outside of its blocks."""

    def __init__(self, work) -> None:
        super().__init__()
        self.layers, self.work = nn.ModuleList([nn.Linear(4, 4)]), work

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.work(self.layers[0](x), labels)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (
            lambda x, y: F.cross_entropy(x, y),
            "Between computes cross_entropy outside of its blocks",
        ),
        (lambda x, y: x.mean(), "Between computes mean outside of its blocks"),
        (lambda x, y: x + torch.arange(3) if x.sum() > 0 else x, "cannot see what Between does"),
    ],
)
def test_work_between_blocks_is_refused(work, message):
    model = Between(work)
    with pytest.raises(MixesTokens, match=message) as error:
        _refuse_work_between(model, dict(_blocks(model)))
    assert "class Losses(nn.Module)" in error.value.try_


def test_unknown_wrappers_are_refused():
    with pytest.raises(InvalidOption, match="wrapper='zero' is not known"):
        lmoe.data_parallel(nn.Linear(2, 2), None, "dp", wrapper="zero")
