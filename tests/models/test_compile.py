"""torch.compile of the U-Net: one graph, or one a block with checkpointing, and the gradients of the eager one."""

import pytest
import torch
from conftest import ALL_TAPS, small_model, thin_model
from torch._dynamo.utils import counters

from method.alignment import token_loss
from models.aligned import AlignedModel
from models.families.table import family_of

BACKEND = "aot_eager"


def gradients(model, batch):
    """Gradients of one step's alignment and output, by name."""
    latents, timesteps, text, teacher = batch
    out = model(latents, timesteps, text)
    loss = out.square().mean() + sum(token_loss(x, teacher) for x in model.get_aligned_tokens().values())
    model.clear_hooks()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    # Its own code generator takes minutes; what is traced is the same.
    compile_as_traced = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda module, mode, dynamic: compile_as_traced(module, backend=BACKEND, dynamic=dynamic),
    )
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("train", "checkpointing"),
    [
        ("lora", True),
        pytest.param("lora", False, marks=pytest.mark.thorough),
        pytest.param("full", True, marks=pytest.mark.thorough),
        pytest.param("full", False, marks=pytest.mark.thorough),
    ],
)
def test_no_graph_breaks_and_the_gradients_are_those_of_the_eager_one(batch, train, checkpointing):
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        found = gradients_of_two_steps(batch, train, checkpointing)
    assert not counters["graph_break"]
    assert counters["frames"]["ok"] == counters["frames"]["total"]
    assert counters["stats"]["unique_graphs"] >= (2 if checkpointing else 1)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name in other:
            torch.testing.assert_close(other[name], found[0][name], rtol=1e-3, atol=1e-5)


def gradients_of_two_steps(batch, train, checkpointing):
    """Of an eager model, and of a compiled one."""
    found = []
    for compiled in (False, True):
        model = thin_model(train)
        if checkpointing:
            model.checkpoint()
        if compiled:
            model.compile_backbone()
        for _ in range(2):
            model.zero_grad()
            found.append(gradients(model, batch))
    return found


def test_alignment_that_comes_and_goes_compiles_twice_and_no_more(base_of, monkeypatch):
    monkeypatch.setattr("test_compile.BACKEND", "eager")  # graphs are counted, in half the time
    family = family_of(base_of("sd3"))
    model = AlignedModel(family, family.load_network(), ("block0", "block1"), 64, train="full").train()
    shape = family.latent_shape(model.backbone)
    text = {name: torch.randn(2, *row) for name, row in family.text_shapes(model.backbone).items()}
    given = torch.randn(2, *shape), family.path(shape).spread(2), text
    model.compile_backbone()
    for _ in range(2):
        model.predict(*given, capture=True)
        assert set(model.taps.captured) == {"block0", "block1"}
        model.clear_hooks()
        model.predict(*given)
        assert not model.taps.captured
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


@pytest.mark.thorough  # of one layer a block it is shown above
def test_with_checkpointing_every_block_of_a_deep_network_is_compiled(batch, monkeypatch):
    """SD-1.5 has two layers a block: more shapes than Dynamo takes by default."""
    monkeypatch.setattr("test_compile.BACKEND", "eager")
    model = small_model(ALL_TAPS)
    model.checkpoint()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        model.compile_backbone()
        gradients(model, batch)
    assert not counters["graph_break"]
