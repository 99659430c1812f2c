"""Folders of models: damaged, of another kind, with code of their own, or not there at all."""

import json
import shutil
import struct

from hostile import Case
from spoil import both, cut, drop_key, edit, fifo, nothing, only, put, remove, set_key, write

BASE, TEACHER, CLASSIFIER = "data/models/sd15-mini", "data/models/dinov2-mini", "data/models/classifier"
TRAIN = "train --config a.yaml run=runs/b"
LATENTS = f"2 --csv data/train.csv --base {BASE} --image-size 32 --workers 0 --out cache_new/latents"
TOKENS = f"3 --csv data/train.csv --teacher {TEACHER} --grid 4 --workers 0 --out cache_new/tokens"
TEXT = f"4 --class-names data/imagenet_classes.json --base {BASE} --out cache_new/text"
SCORE = "evaluate metrics runs/a eval.num_samples=8"
# Each part: the file of its weights, its config, the command that loads it, and what the line must name.
PARTS = {
    "the network": (f"{BASE}/unet/diffusion_pytorch_model.safetensors", f"{BASE}/unet/config.json", TRAIN, "unet"),
    "the VAE": (f"{BASE}/vae/diffusion_pytorch_model.safetensors", f"{BASE}/vae/config.json", LATENTS, "vae"),
    "the text encoder": (f"{BASE}/text_encoder/model.safetensors", f"{BASE}/text_encoder/config.json", TEXT, "text_encoder"),
    "the teacher": (f"{TEACHER}/model.safetensors", f"{TEACHER}/config.json", TOKENS, "dinov2-mini"),
    "the classifier": (f"{CLASSIFIER}/model.safetensors", f"{CLASSIFIER}/config.json", SCORE, "classifier"),
}  # fmt: skip
CODE = "import pathlib\npathlib.Path('hacked').touch()\nclass Mine: pass\n"


def header(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def pickled(file: str):
    """Only a pickle is there."""

    def spoil(folder):
        path = folder / file
        path.unlink()
        put(
            path.with_name(
                "pytorch_model.bin" if path.name == "model.safetensors" else "diffusion_pytorch_model.bin"
            ),
            b"x",
        )

    return spoil


def renamed(file: str):
    """Weights of other names: the file of another part."""

    def spoil(folder):
        other = CLASSIFIER if "classifier" not in file else TEACHER
        put(folder / file, (folder / other / "model.safetensors").read_bytes())

    return spoil


def no_code_ran(folder):
    assert not (folder / "hacked").exists()


def foreign_code(config: str):
    """A config that names classes of the folder's own code."""

    def spoil(folder):
        path = only(folder, config)
        content = json.loads(path.read_text())
        names = ("AutoConfig", "AutoModel", "AutoModelForImageClassification")
        content |= {"auto_map": dict.fromkeys(names, "mine.Mine"), "model_type": "mine"}
        put(path, json.dumps(content))
        put(path.with_name("mine.py"), CODE)

    return spoil


def rows():
    for part, (weights, config, command, says) in PARTS.items():
        for what, spoil in {
            "weights that are empty": write(weights, b""),
            "weights that are cut off": cut(weights),
            "weights without a header": write(weights, b"\x00" * 100),
            "weights with a header of nonsense": write(weights, header(b"{]")),
            "weights with a header beyond memory": write(weights, struct.pack("<Q", 2**60)),
            "weights of another model": renamed(weights),
            "weights that are missing": remove(weights),
            "weights that are a FIFO": fifo(weights),
            "only a pickle": pickled(weights),
            "a config that is empty": write(config, b""),
            "a config that is no JSON": write(config, b"{"),
            "a config that is a list": write(config, b"[]"),
            "a config that is 3,000 levels deep": write(config, b'{"a":' + b"[" * 3000 + b"]" * 3000 + b"}"),
            "a config that is not UTF-8": write(config, b'{"a": "\xff"}'),
            "a config that is missing": remove(config),
        }.items():  # fmt: skip
            yield Case(f"{part} has {what}", spoil, command, (says,))
        yield Case(f"{part} brings code of its own", foreign_code(config), command, (), check=no_code_ran, goes_on=part in ("the network", "the VAE"), loses=("runs/b",))  # fmt: skip
    for part, config, key, value, command, says in (
        ("the network", f"{BASE}/unet/config.json", "block_out_channels", [8, 8, 8, 8], TRAIN, "unet"),
        ("the network", f"{BASE}/unet/config.json", "block_out_channels", "x", TRAIN, "unet"),
        ("the network", f"{BASE}/unet/config.json", "norm_num_groups", 7, TRAIN, "unet"),
        ("the network", f"{BASE}/unet/config.json", "down_block_types", ["None"] * 4, TRAIN, "unet"),
        ("the network", f"{BASE}/unet/config.json", "in_channels", None, TRAIN, "unet"),
        ("the network", f"{BASE}/unet/config.json", "_class_name", "FluxTransformer2DModel", TRAIN, "unet"),
        ("the VAE", f"{BASE}/vae/config.json", "latent_channels", 8, LATENTS, "vae"),
        ("the VAE", f"{BASE}/vae/config.json", "scaling_factor", "x", LATENTS, "vae"),
        ("the VAE", f"{BASE}/vae/config.json", "scaling_factor", None, LATENTS, "vae"),
        ("the VAE", f"{BASE}/vae/config.json", "block_out_channels", 3, LATENTS, "vae"),
        ("the text encoder", f"{BASE}/text_encoder/config.json", "num_hidden_layers", 1, TEXT, "more layers"),
        ("the text encoder", f"{BASE}/text_encoder/config.json", "hidden_size", 33, TEXT, "text_encoder"),
        ("the text encoder", f"{BASE}/text_encoder/config.json", "hidden_size", "x", TEXT, "text_encoder"),
        ("the text encoder", f"{BASE}/text_encoder/config.json", "model_type", "bert", TEXT, "text_encoder"),
        ("the teacher", f"{TEACHER}/config.json", "hidden_size", 33, TOKENS, "dinov2-mini"),
        ("the teacher", f"{TEACHER}/config.json", "hidden_size", "x", TOKENS, "dinov2-mini"),
        ("the teacher", f"{TEACHER}/config.json", "patch_size", 0, TOKENS, "dinov2-mini"),
        ("the teacher", f"{TEACHER}/config.json", "model_type", "bert", TOKENS, "bert model; give one of a known model_type (DINOv2: "),
        ("the teacher", f"{TEACHER}/config.json", "model_type", "siglip_text_model", TOKENS, "SigLIP: siglip, siglip_vision_model"),
        ("the teacher", f"{TEACHER}/config.json", "model_type", "siglip", TOKENS, "dinov2-mini"),
        ("the teacher", f"{TEACHER}/config.json", "model_type", "dinov3_vit", TOKENS, "dinov2-mini"),
        ("the teacher", f"{TEACHER}/config.json", "num_channels", 1, TOKENS, "dinov2-mini"),
        ("the teacher", f"{TEACHER}/preprocessor_config.json", "image_mean", "x", TOKENS, "image_mean"),
        ("the teacher", f"{TEACHER}/preprocessor_config.json", "image_std", [0, 0, 0], TOKENS, "image_std"),
        ("the teacher", f"{TEACHER}/preprocessor_config.json", "do_normalize", False, TOKENS, "do_normalize"),
        ("the teacher", f"{TEACHER}/config.json", "model_type", 3, TOKENS, "dinov2-mini"),
        ("the classifier", f"{CLASSIFIER}/config.json", "architectures", "x", SCORE, "classifier"),
        ("the classifier", f"{CLASSIFIER}/config.json", "architectures", [3], SCORE, "classifier"),
        ("the classifier", f"{CLASSIFIER}/config.json", "hidden_sizes", "x", SCORE, "classifier"),
        ("the classifier", f"{CLASSIFIER}/preprocessor_config.json", "image_mean", "x", SCORE, "classifier"),
        ("the classifier", f"{CLASSIFIER}/preprocessor_config.json", "image_mean", ["a", "b", "c"], SCORE, "classifier"),
        ("the classifier", f"{CLASSIFIER}/preprocessor_config.json", "image_std", [0, 0, 0], SCORE, "classifier"),
        ("the classifier", f"{CLASSIFIER}/preprocessor_config.json", "crop_size", {"height": -1}, SCORE, "classifier"),
        ("the scheduler", f"{BASE}/scheduler/scheduler_config.json", "beta_start", "x", TRAIN, "scheduler"),
        ("the scheduler", f"{BASE}/scheduler/scheduler_config.json", "num_train_timesteps", 0, TRAIN, "scheduler"),
        ("the scheduler", f"{BASE}/scheduler/scheduler_config.json", "prediction_type", "x", TRAIN, "prediction"),
        ("the scheduler", f"{BASE}/scheduler/scheduler_config.json", "beta_schedule", "x", TRAIN, "scheduler"),
    ):  # fmt: skip
        yield Case(f"{part} has {value!r} as {key}", edit(config, set_key(key, to=value)), command, (says,))
    yield Case("a base without an index", remove(f"{BASE}/model_index.json"), TRAIN, ("model_index.json",))
    yield Case(
        "an index that is no JSON", write(f"{BASE}/model_index.json", b"{"), TRAIN, ("model_index.json",)
    )
    yield Case(
        "an index without a class",
        edit(f"{BASE}/model_index.json", drop_key("_class_name")),
        TRAIN,
        ("model_index",),
    )
    yield Case(
        "an index of a number",
        edit(f"{BASE}/model_index.json", set_key("_class_name", to=3)),
        TRAIN,
        ("model_index",),
    )
    yield Case(
        "a tokenizer that is empty", write(f"{BASE}/tokenizer/tokenizer.json", b""), TEXT, ("tokenizer",)
    )
    yield Case("a tokenizer that is missing", lambda folder: [path.unlink() for path in (folder / BASE / "tokenizer").iterdir()], TEXT, ("tokenizer",))  # fmt: skip
    for name in ("./none", "../none", "~/none", "none/", "data/none", "data/models/none", "none", "a/b/c", "/none", "none.pth", "data/none.safetensors", "C:\\models"):  # fmt: skip
        for what, command in {
            "base": TRAIN + f" 'model.base={name}'",
            "teacher": TOKENS.replace(TEACHER, f"'{name}'"),
            "extractor": SCORE + f" 'eval.extractor={name}'",
        }.items():
            yield Case(f"no {what} at {name}", nothing, command, (name.removesuffix("/").removeprefix("~/"),))
    gone = lambda folder: shutil.rmtree(folder / BASE / "vae")  # noqa: E731
    yield Case("a base without its VAE, of a run", gone, SCORE, ("has no vae/ folder",))
    links = both(
        remove(f"{BASE}/unet/config.json"),
        lambda folder: (folder / BASE / "unet/config.json").symlink_to("config.json"),
    )
    yield Case("a config of the network that links to itself", links, TRAIN, ("unet",))
    teacher = "3 --csv data/train.csv --teacher teacher.pth --grid 4 --workers 0 --out cache_new/tokens"
    for what, data in {
        "empty": b"",
        "text": b"hello",
        "a zip of nothing": b"PK\x05\x06" + b"\x00" * 18,
    }.items():
        yield Case(f"a teacher's file that is {what}", write("teacher.pth", data), teacher, ("teacher.pth",))
    for what, model in {
        "a text model": f"{BASE}/text_encoder",
        "a classifier": CLASSIFIER,
        "a pipeline": BASE,
    }.items():
        yield Case(f"a teacher that is {what}", nothing, TOKENS.replace(TEACHER, model), (model,))
    yield Case("a preparation of the teacher that is a FIFO", fifo(f"{TEACHER}/preprocessor_config.json"), TOKENS, ("preprocessor_config.json",))  # fmt: skip
    yield Case("a teacher's file that is a FIFO", fifo("teacher.pth"), teacher, ("teacher.pth",))
