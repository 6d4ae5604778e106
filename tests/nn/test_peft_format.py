"""A folder of the peft library is refused, or gives the library's own logits."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from lit_spu.backbones import Backbone, Role, load_backbone
from lit_spu.errors import UserError
from lit_spu.methods.base import Method
from lit_spu.methods.ia3 import IA3
from lit_spu.methods.lora import LoRA
from lit_spu.nn.peft_format import write_peft_folder
from lit_spu.tasks import TASKS
from tests.conftest import encode

peft: Any = pytest.importorskip("peft")
Tiny = Callable[[str], str]
BERT: dict[str, Role] = {
    "query": "query",
    "key": "key",
    "value": "value",
    "attention.output.dense": "output",
    "intermediate.dense": "up",
}


def plain(folder: str) -> Backbone:
    """The backbone; its new head is always the same."""
    torch.manual_seed(1)
    return load_backbone(folder, TASKS["sst2"]).eval()


def save_adapter(config: Any, model: str, folder: Path) -> None:
    """Write a folder of an adapter with random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about its own settings
        made = peft.get_peft_model(plain(model).model, config)
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        made.save_pretrained(folder)


@torch.no_grad()
def library_logits(model: str, folder: Path) -> Tensor:
    """The logits of the library."""
    backbone = plain(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = peft.PeftModel.from_pretrained(backbone.model, str(folder)).eval()
    batch = encode(backbone)
    if backbone.has_classifier:
        return twin(**backbone.model_inputs(batch)).logits  # type: ignore[no-any-return]
    return backbone(batch)  # type: ignore[no-any-return]


@torch.no_grad()
def own_logits(method: Method) -> Tensor:
    """The logits of a method."""
    return method.eval()(encode(method.backbone))  # type: ignore[no-any-return]


def lora(model: str, folder: Path, **changes: Any) -> LoRA:
    """LoRA with the rank, scale and layers of a folder, as far as one setting can have them."""
    tensors = load_file(folder / "adapter_model.safetensors")
    values = json.loads((folder / "adapter_config.json").read_text())
    ranks = [len(tensor) for name, tensor in tensors.items() if "lora_A" in name] or [1]
    alphas = list((values.get("alpha_pattern") or {}).values()) or [values["lora_alpha"]]
    roles = [role for name, role in BERT.items() if any(f"{name}.lora_A" in tensor for tensor in tensors)]
    own = {"rank": ranks[0], "alpha": alphas[0], "roles": roles or ["query"], "rank_stabilised": values["use_rslora"]}
    torch.manual_seed(1)
    return LoRA(backbone=model, adapter=str(folder), **{**own, **changes})


NAMES = st.lists(st.sampled_from(sorted(BERT)), min_size=1, unique=True)
PATTERNS = (
    "query",
    "self.(query|key)",
    "bert.encoder.layer.0.attention.self.query",
    "dense",
    r"layer\.[0-3]\..*",
    "u.ry",
)
LORA = st.fixed_dictionaries(
    {
        "r": st.sampled_from([1, 2, 4]),
        "lora_alpha": st.sampled_from([4, 8, 32]),
        "target_modules": st.one_of(NAMES, st.sampled_from([r".*\.(query|value)", r".*layer\.1.*query", "all-linear"])),
    },
    optional={
        "use_rslora": st.booleans(),
        "alpha_pattern": st.dictionaries(st.sampled_from(PATTERNS), st.sampled_from([8, 32]), max_size=3),
        "rank_pattern": st.dictionaries(st.sampled_from(PATTERNS), st.sampled_from([2, 4]), max_size=3),
        "task_type": st.sampled_from([None, "SEQ_CLS"]),
        "modules_to_save": st.sampled_from([None, ["classifier"], ["pooler"], ["LayerNorm"], ["query"]]),
        "exclude_modules": st.sampled_from([None, ["key"], r".*layer\.2.*"]),
        "bias": st.sampled_from(["none", "lora_only", "all"]),
        "init_lora_weights": st.sampled_from([True, False, "gaussian", "orthogonal", "pissa", "olora", "mica"]),
        "use_dora": st.booleans(),
        "lora_bias": st.booleans(),
        "fan_in_fan_out": st.booleans(),
        "layers_to_transform": st.sampled_from([None, 1, [0, 1], [0, 1, 2, 3]]),
        "layers_pattern": st.sampled_from([None, "layer", ["layer"]]),
        "trainable_token_indices": st.sampled_from([None, [1, 2]]),
        "layer_replication": st.sampled_from([None, [(0, 4), (2, 4)]]),
    },
)
BY_ORACLE = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def is_same_or_refused(config: Any, model: str, load: Callable[[str, Path], Method]) -> bool:
    """Compare with the library; return whether the folder is accepted."""
    with TemporaryDirectory() as made:
        folder = Path(made)
        try:
            save_adapter(config, model, folder)
            theirs = library_logits(model, folder)
        except (ValueError, TypeError, RuntimeError, KeyError, NotImplementedError):  # the library refuses it itself
            return False
        try:
            own = own_logits(load(model, folder))
        except UserError:
            return False
        torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-4)
        return True


@pytest.mark.slow
def test_every_lora_folder_gives_the_librarys_logits_or_is_refused(tiny: Tiny) -> None:
    accepted = 0

    @BY_ORACLE
    @given(LORA)
    def check(values: dict[str, Any]) -> None:
        nonlocal accepted
        try:
            config = peft.LoraConfig(**values)
        except ValueError:
            return
        accepted += is_same_or_refused(config, tiny("bert"), lora)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check()
    assert accepted >= 3


@pytest.mark.parametrize(
    ("changes", "is_accepted"),
    [
        ({}, True),
        ({"alpha_pattern": {"query": 32, "value": 32}}, True),
        ({"alpha_pattern": {"(query|value)": 32}}, True),
        ({"alpha_pattern": {"query": 32}}, False),
        ({"rank_pattern": {"self.query": 2, "v.*e": 2}}, True),
        ({"rank_pattern": {"query": 2}}, False),
        ({"use_rslora": True}, True),
        ({"init_lora_weights": "gaussian"}, True),
        ({"init_lora_weights": "orthogonal"}, True),
        ({"init_lora_weights": "pissa"}, False),
        ({"init_lora_weights": "pissa_niter_2"}, False),
        ({"init_lora_weights": "olora"}, False),
        ({"use_dora": True}, False),
        ({"bias": "lora_only"}, False),
        ({"bias": "all"}, False),
        ({"lora_bias": True}, False),
        ({"layers_to_transform": [0, 1, 2, 3]}, True),
        ({"layers_to_transform": [0, 1]}, False),
        ({"exclude_modules": ["key"]}, True),
        ({"exclude_modules": ["layer.0.attention.self.query"]}, False),
        ({"task_type": "SEQ_CLS"}, True),
        ({"modules_to_save": ["classifier", "pooler"]}, True),
        ({"modules_to_save": ["LayerNorm"]}, False),
        ({"trainable_token_indices": [1]}, False),
        ({"target_modules": r".*self\.(query|value)"}, True),
    ],
)
def test_lora_folders(tiny: Tiny, changes: dict[str, Any], is_accepted: bool) -> None:
    values = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], **changes}
    assert is_same_or_refused(peft.LoraConfig(**values), tiny("bert"), lora) is is_accepted


IA3_VALUES = st.fixed_dictionaries(
    {"target_modules": NAMES, "feedforward_modules": st.lists(st.sampled_from([*BERT, "dense"]), max_size=2)},
    optional={
        "task_type": st.sampled_from([None, "SEQ_CLS"]),
        "modules_to_save": st.sampled_from([None, ["classifier"], ["pooler"]]),
        "exclude_modules": st.sampled_from([None, ["key"], r".*layer\.2.*"]),
        "init_ia3_weights": st.booleans(),
        "fan_in_fan_out": st.booleans(),
    },
)


def ia3(model: str, folder: Path) -> IA3:
    """IA3 with the layers of a folder."""
    tensors = load_file(folder / "adapter_model.safetensors")
    named = {role: t for name, role in BERT.items() for path, t in tensors.items() if f"{name}.ia3_l" in path}
    inputs = [role for role, vector in named.items() if len(vector) == 1]
    torch.manual_seed(1)
    return IA3(
        backbone=model, adapter=str(folder), inputs=inputs, outputs=[role for role in named if role not in inputs]
    )


@pytest.mark.slow
def test_every_ia3_folder_gives_the_librarys_logits_or_is_refused(tiny: Tiny) -> None:
    accepted = 0

    @BY_ORACLE
    @given(IA3_VALUES)
    def check(values: dict[str, Any]) -> None:
        nonlocal accepted
        try:
            config = peft.IA3Config(**values)
        except ValueError:
            return
        accepted += is_same_or_refused(config, tiny("bert"), ia3)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check()
    assert accepted >= 10


def rewrite(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"a_future_key": True}, "a_future_key=True changes what the adapter computes"),
        ({"kasa_config": {"beta": 1}}, "kasa_config="),
        ({"target_parameters": ["x"]}, "target_parameters="),
        ({"r": "4"}, "r cannot be '4'"),
        ({"r": 0}, "r cannot be 0"),
        ({"r": None}, "r cannot be None"),
        ({"lora_alpha": math.nan}, "lora_alpha cannot be nan"),
        ({"lora_alpha": None}, "lora_alpha cannot be None"),
        ({"lora_alpha": 10**400}, "lora_alpha cannot be inf"),
        ({"rank_pattern": {"query": 0}}, "rank_pattern cannot be"),
        ({"layers_to_transform": True}, "layers_to_transform cannot be True"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path cannot be 5"),
        ({"r": 2}, r"has a pair of the shapes \[4, 32\]"),
        ({"alpha_pattern": [1]}, r"alpha_pattern cannot be \[1\]"),
        ({"alpha_pattern": {"(": 1}}, "is no regular expression"),
        ({"target_modules": ["query"]}, "adapter_model.safetensors has an adapter for .* adapter_config.json has none"),
        ({"target_modules": None}, "adapter_config.json has none"),
        ({"layers_to_transform": [1]}, "adapter_config.json has none"),
        ({"target_modules": ["query", "value", "key"]}, "adapter_config.json has an adapter"),
        ({"task_type": None, "modules_to_save": None}, "modules_to_save in adapter_config.json lacks"),
        ({"peft_type": "LOHA"}, "holds LOHA, but this method needs LORA"),
    ],
)
def test_a_changed_config_is_refused_by_its_key(tiny: Tiny, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    save_adapter(config, tiny("bert"), tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(UserError, match=says):
        LoRA(backbone=tiny("bert"), adapter=str(tmp_path), roles=["query", "value"])


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", None])
def test_damaged_weights_are_refused(tiny: Tiny, tmp_path: Path, content: bytes | None) -> None:
    save_adapter(peft.LoraConfig(r=4, target_modules=["query", "value"]), tiny("bert"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    if content is None:
        file.rename(tmp_path / "adapter_model.bin")
    else:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"adapter_model.bin there with peft|cannot be read as safetensors"):
        LoRA(backbone=tiny("bert"), adapter=str(tmp_path), roles=["query", "value"])


def test_an_adapter_of_another_base_model_is_announced(tiny: Tiny, tmp_path: Path) -> None:
    save_adapter(peft.LoraConfig(r=4, target_modules=["query", "value"]), tiny("bert"), tmp_path)
    for name in ("some/other-bert", "/another/folder"):
        rewrite(tmp_path, base_model_name_or_path=name)
        with pytest.warns(UserWarning, match=f"was trained on '{name}'"):
            lora(tiny("bert"), tmp_path)
    rewrite(tmp_path, base_model_name_or_path=f"an-owner/{Path(tiny('bert')).name}")
    lora(tiny("bert"), tmp_path)


@pytest.mark.parametrize(
    ("values", "method", "roles"),
    [
        ({"r": 4}, LoRA, {"roles": ["query", "value"]}),
        ({"r": 12, "lora_alpha": 24}, LoRA, {"roles": ["query", "key", "value"]}),  # of the rank of three blocks
        ({}, IA3, {"outputs": ["query", "key"], "inputs": []}),
    ],
)
def test_a_part_of_a_fused_layer_is_not_the_layer(
    tiny: Tiny, tmp_path: Path, values: dict[str, Any], method: Any, roles: dict[str, Any]
) -> None:
    common: dict[str, Any] = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    config = peft.LoraConfig(**values, **common) if values else peft.IA3Config(feedforward_modules=[], **common)
    save_adapter(config, tiny("gpt2"), tmp_path)
    with pytest.raises(UserError, match=r"changes more of transformer\.h\.0\.attn\.c_attn"):
        method(backbone=tiny("gpt2"), adapter=str(tmp_path), **roles)


@pytest.mark.parametrize("roles", [["query"], ["query", "value"], ["query", "key", "value"], list(get_args(Role))])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_any_parts_of_a_fused_layer_are_read_back(tiny: Tiny, tmp_path: Path, roles: list[Any], kind: str) -> None:
    def make(**given: Any) -> Method:
        if kind == "ia3":
            return IA3(backbone=tiny("gpt2"), outputs=roles, inputs=[], **given)
        return LoRA(backbone=tiny("gpt2"), roles=roles, **given)

    method = make()
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    write_peft_folder(method.backbone, method.adapters, tmp_path / "out")
    torch.testing.assert_close(own_logits(make(adapter=str(tmp_path / "out"))), own_logits(method))
    torch.testing.assert_close(library_logits(tiny("gpt2"), tmp_path / "out"), own_logits(method), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("targets", [["query", "value"], r"encoder\.layer\..*\.query"])
@pytest.mark.filterwarnings("ignore")  # of peft about transformers
def test_an_adapter_made_on_a_model_without_a_head(tiny: Tiny, tmp_path: Path, targets: Any) -> None:
    """As transformers' AutoModel is; the library's adapter changes the base model in place, below the head."""
    patterns = {"layer.0.attention.self.query": 16}
    config = peft.LoraConfig(r=4, lora_alpha=16, alpha_pattern=patterns, target_modules=targets)
    made = peft.get_peft_model(plain(tiny("bert")).model.base_model, config)
    torch.manual_seed(2)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=3)
    made.save_pretrained(tmp_path)
    own = own_logits(lora(tiny("bert"), tmp_path))
    backbone = plain(tiny("bert"))
    without = backbone.model(**backbone.model_inputs(encode(backbone))).logits
    peft.PeftModel.from_pretrained(backbone.model.base_model, str(tmp_path)).eval()
    expected = backbone.model(**backbone.model_inputs(encode(backbone))).logits
    torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-4)
    assert (own - without).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2"])
def test_the_reported_alpha_pattern_on_a_real_model(shared: Path, tmp_path: Path, name: str) -> None:
    model = str(shared / "models" / name)
    if not Path(model).is_dir():
        pytest.skip(f"{model} is absent")
    patterns = {"query": 32, "value": 32}
    save_adapter(
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], alpha_pattern=patterns), model, tmp_path
    )
    torch.manual_seed(1)
    with pytest.raises(UserError, match=r"Use --model\.rank=4 --model\.alpha=32"):
        LoRA(backbone=model, adapter=str(tmp_path), roles=["query", "value"], rank=4, alpha=8)
    torch.testing.assert_close(own_logits(lora(model, tmp_path)), library_logits(model, tmp_path), atol=1e-4, rtol=1e-4)
