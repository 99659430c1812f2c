"""The demo's small models: the classes of the full-size models in small sizes, trained on digits in seconds.

Training uses one CPU thread. A `train_*` function returns a model in eval mode, which depends only on the arguments
and on the global random state (see `reproducible`). A `measure_*` function returns a measure of a model's quality.
Images are `(N, 3, 32, 32)` in [0, 1].
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from common.files import write_json
from models.teachers.dinov2 import IMAGENET_MEAN, IMAGENET_STD

SIZE, PATCH = 32, 8
CLASSIFIER_MEAN, CLASSIFIER_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # this maps [0, 1] to [-1, 1]
KL_WEIGHT = 1e-6  # weight of the KL in nats per image, against the mean squared error per pixel
PIXEL_WEIGHT = 4.0  # weight of the teacher's pixel loss against its class loss
PROMPTS = ("a photo of a {}", "a photo of the {}", "a picture of a {}", "a drawing of a {}", "the {}", "{}")


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seed torch and limit it to one thread, so that results do not depend on the number of cores.

    At the end of the block the random state and the number of threads are restored.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def build_unet(text_width: int) -> UNet2DConditionModel:
    """Return a small untrained U-Net like SD-1.5's; it takes latents of 16x16, and its mid-block works on 2x2."""
    return UNet2DConditionModel(
        sample_size=SIZE // 2, block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=text_width,
        attention_head_dim=1,  # the number of heads, as in SD-1.5's own config (there 8)
    ).eval()  # fmt: skip


def build_scheduler() -> DDIMScheduler:
    """Return SD-1.5's noise schedule with v-prediction, which a new network learns far faster than epsilon-prediction."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
        set_alpha_to_one=False, prediction_type="v_prediction",
        timestep_spacing="trailing",  # sampling starts at the last timestep, which matters with few steps
    )  # fmt: skip


def train_vae(images: Tensor, steps: int) -> AutoencoderKL:
    """Train an autoencoder with SD-1.5's block types, four latent channels and down-sampling 2; set its scaling factor.

    The loss is the squared error plus a weak KL term, which keeps the latents centred and smooth.
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,  # with one channel per group, absolute brightness is lost (8 groups: 29 dB instead of 37)
        sample_size=SIZE,
    )
    pixels = 2 * images - 1

    def loss(index: Tensor) -> Tensor:
        x = pixels[index]  # (B, 3, 32, 32)
        latent = vae.encode(x).latent_dist
        return F.mse_loss(vae.decode(latent.sample()).sample, x) + KL_WEIGHT * latent.kl().mean()

    fit("vae", vae.parameters(), loss, len(images), steps, batch=8, peak_lr=8e-3)
    vae.eval()
    vae.register_to_config(scaling_factor=1 / encode(vae, images).std().item())
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Return unscaled latents (N, 4, 16, 16), the modes of the posterior."""
    return torch.cat([vae.encode(2 * x - 1).latent_dist.mode() for x in images.split(64)])


@torch.no_grad()
def measure_psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Return the peak signal-to-noise ratio of the reconstructions in dB, from the mean error over all images."""
    decoded = torch.cat([vae.decode(z).sample for z in encode(vae, images).split(64)])  # (N, 3, 32, 32)
    error = F.mse_loss((decoded / 2 + 0.5).clamp(0, 1), images)
    return -10 * error.log10().item()


def build_teacher(initializer_range: float = 0.02) -> Dinov2Model:
    """Return a small untrained DINOv2, which makes 4x4 tokens of width 64."""
    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=5, num_attention_heads=4, mlp_ratio=2, image_size=SIZE, patch_size=PATCH,
        initializer_range=initializer_range,
    )  # fmt: skip
    return Dinov2Model(config)


def train_teacher(images: Tensor, labels: Tensor, steps: int) -> Dinov2Model:
    """Train a small DINOv2 to predict the class of an image and the pixels of each patch.

    A tenth of the patches is masked. The mean token predicts the class, and each token, masked or not, the pixels of
    its own patch. Without the pixel loss the tokens of one image become nearly equal (cosine .82).
    """
    teacher = build_teacher()
    classify, paint = nn.Linear(64, 10), nn.Linear(64, PATCH * PATCH)
    x_all = normalise(images, IMAGENET_MEAN, IMAGENET_STD)
    gray = 2 * images.mean(1, keepdim=True) - 1
    patches = F.unfold(gray, PATCH, stride=PATCH).mT  # (N, 16, 64)
    teacher.train()

    def loss(index: Tensor) -> Tensor:
        masked = torch.rand(len(index), 16) < 0.1
        tokens = teacher(x_all[index], bool_masked_pos=masked).last_hidden_state[:, 1:]  # (B, 16, 64)
        class_loss = F.cross_entropy(classify(tokens.mean(1)), labels[index])
        return class_loss + PIXEL_WEIGHT * F.mse_loss(paint(tokens), patches[index])

    parameters = [*teacher.parameters(), *classify.parameters(), *paint.parameters()]
    fit("teacher", parameters, loss, len(images), steps, batch=64, peak_lr=5e-3, weight_decay=0.05)
    return teacher.eval()


@torch.no_grad()
def teacher_tokens(teacher: Dinov2Model, images: Tensor) -> Tensor:
    """Return patch tokens (N, 16, 64), without the CLS token."""
    x = normalise(images, IMAGENET_MEAN, IMAGENET_STD)
    return torch.cat([teacher(part).last_hidden_state[:, 1:] for part in x.split(256)])


def measure_linear_probe(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> float:
    """Return the held-out accuracy of a logistic regression on mean tokens; each pair is (tokens, labels)."""
    probe = LogisticRegression(max_iter=2000).fit(train[0].mean(1).numpy(), train[1].numpy())
    return float(probe.score(val[0].mean(1).numpy(), val[1].numpy()))


def measure_token_cosine(tokens: Tensor) -> float:
    """Return the mean cosine between different tokens (N, L, D) of an image; 1 means no spatial detail at all."""
    unit = F.normalize(tokens, dim=-1)
    gram = unit @ unit.mT  # (N, L, L)
    count = tokens.shape[1]
    return ((gram.sum((1, 2)) - count) / (count * (count - 1))).mean().item()


def build_classifier(names: list[str]) -> ResNetForImageClassification:
    """Return a small untrained ResNet for classes of these names."""
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic",
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    return ResNetForImageClassification(config)


def train_classifier(
    images: Tensor, labels: Tensor, names: list[str], steps: int
) -> ResNetForImageClassification:
    """Train a small ResNet on shifted digits, to judge generated images; it is not of the teacher's architecture or seed."""
    classifier = build_classifier(names)
    x_all = F.pad(normalise(images, CLASSIFIER_MEAN, CLASSIFIER_STD), (2, 2, 2, 2), value=-1.0)
    classifier.train()

    def loss(index: Tensor) -> Tensor:
        top, left = torch.randint(0, 5, (2,)).tolist()
        x = x_all[index, :, top : top + SIZE, left : left + SIZE]  # (B, 3, 32, 32)
        x = x + 0.1 * torch.randn_like(x)
        return F.cross_entropy(classifier(x).logits, labels[index])

    parameters = classifier.parameters()
    fit("classifier", parameters, loss, len(images), steps, batch=64, peak_lr=4e-3, weight_decay=0.01)
    return classifier.eval()


@torch.no_grad()
def measure_accuracy(classifier: ResNetForImageClassification, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that are classified correctly."""
    x = normalise(images, CLASSIFIER_MEAN, CLASSIFIER_STD)
    return (classifier(x).logits.argmax(1) == labels).float().mean().item()


def fit(
    stage: str, parameters: Iterable[nn.Parameter], loss: Callable[[Tensor], Tensor], count: int, steps: int, *,
    batch: int, peak_lr: float, weight_decay: float = 0.0,
) -> None:  # fmt: skip
    """Minimise `loss(indices)` with AdamW and a one-cycle learning rate, showing a progress bar on a terminal."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, total_steps=steps + 1, pct_start=0.1)
    for _ in tqdm(range(steps), desc=stage, disable=None, leave=False, mininterval=0.5):
        optimizer.zero_grad()
        loss(torch.randint(count, (batch,))).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def build_tokenizer(words: list[str]) -> CLIPTokenizer:
    """Return a CLIP tokenizer that can encode every byte, and that encodes each of `words` in few tokens.

    The vocabulary has CLIP's order: the 256 bytes, these at the end of a word, the merges, and the two special tokens.
    """
    alphabet = bytes_to_unicode()  # the printable character of each byte, GPT-2's table
    byte_level = [alphabet[byte] for byte in range(256)]
    merges: dict[tuple[str, str], str] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        joined = pieces[0]
        for piece in pieces[1:]:
            merges.setdefault((joined, piece), joined + piece)
            joined += piece
    tokens = [*byte_level, *(c + "</w>" for c in byte_level), *merges.values()]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=77)


def train_text_encoder(tokenizer: CLIPTokenizer, names: list[str], steps: int) -> CLIPTextModel:
    """Train a small CLIP text encoder by a contrastive loss (InfoNCE) between two wordings of each class.

    The empty prompt, which guidance uses, is a class of its own.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, projection_dim=32, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    encoder = CLIPTextModel(config)
    ids = torch.stack([class_prompts(tokenizer, wording, names) for wording in PROMPTS])  # (P, K + 1, 77)
    classes = torch.arange(len(names) + 1)

    def loss(_: Tensor) -> Tensor:
        one, other = (torch.randint(len(PROMPTS), (len(classes),)) for _ in range(2))
        pooled = encoder(torch.cat([ids[one, classes], ids[other, classes]])).pooler_output  # (2(K + 1), 32)
        a, b = F.normalize(pooled, dim=-1).chunk(2)
        return F.cross_entropy(a @ b.mT / 0.1, classes)

    fit("text", encoder.parameters(), loss, len(classes), steps, batch=1, peak_lr=3e-3)
    return encoder.eval()


def class_prompts(tokenizer: CLIPTokenizer, wording: str, names: list[str]) -> Tensor:
    """Return padded ids (K + 1, 77), as StableDiffusionPipeline makes them, of one wording for all classes and of ""."""
    prompts = [*map(wording.format, names), ""]
    return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def measure_prompt_cosine(tokenizer: CLIPTokenizer, encoder: CLIPTextModel, names: list[str]) -> float:
    """Return the largest cosine between the pooled states of two prompts, of all classes and the empty one.

    It is well below 1 if the prompts are distinct.
    """
    pooled = encoder(class_prompts(tokenizer, PROMPTS[0], names)).pooler_output
    unit = F.normalize(pooled, dim=-1)  # (K + 1, 32)
    return (unit @ unit.mT - 2 * torch.eye(len(unit))).max().item()


def write_preprocessor(folder: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Write `preprocessor_config.json`, which tells users of the model its input size, mean and standard deviation."""
    content = {
        "image_processor_type": "BitImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"shortest_edge": SIZE}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": SIZE, "width": SIZE},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(mean), "image_std": list(std),
    }  # fmt: skip
    write_json(folder / "preprocessor_config.json", content)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Subtract `mean` from images (N, 3, H, W) in [0, 1] and divide by `std`, per channel."""
    return (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
