"""Make the models of the moving digits, with their measures; the trainings are in `moving_models.py`.

`make.py` lists these models with its own. The heavy libraries are imported inside the functions, as there.
"""

from collections.abc import Callable
from pathlib import Path

from miniature.digits import CLASS_NAMES

# The least value that each measure must reach, as in `make.py`.
FLOORS = {
    "vae_psnr_db": 26.0,
    "vae_stillness": 0.5,  # the background flickers by one grey level of 255
    "caption_separation": 0.5,  # 1 - the largest cosine between two captions
    "teacher_linear_probe": 0.95,
    "digit_accuracy": 0.97,  # of frames
    "motion_accuracy": 0.99,
}
STEPS = {
    False: {"vae": 1200, "text": 150, "teacher": 1500, "digit": 200, "motion": 300},
    True: {"vae": 2, "text": 3, "teacher": 2, "digit": 2, "motion": 2},
}
MEASURED = 100  # held-out digits in each motion on which the autoencoder is measured


def make_ltx(out: Path, folder: Path, steps: dict[str, int]) -> dict[str, float]:
    """Save a folder of LTX-Video with a trained autoencoder, a trained text encoder and an untrained transformer."""
    import diffusers

    from miniature import moving_models as moving
    from miniature.moving import load_digits

    (digits, _), (held_out, _) = load_digits(out, "train"), load_digits(out, "val")
    vae = moving.train_vae(digits, steps["vae"])
    tokenizer = moving.build_tokenizer(CLASS_NAMES)
    encoder = moving.train_text_encoder(tokenizer, CLASS_NAMES, steps["text"])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    diffusers.LTXPipeline(scheduler, vae, encoder, tokenizer, moving.build_network()).save_pretrained(folder)
    separation = 1 - moving.measure_caption_cosine(tokenizer, encoder, CLASS_NAMES)
    return moving.measure_vae(vae, held_out[:MEASURED]) | {"caption_separation": separation}


def make_teacher(out: Path, folder: Path, steps: dict[str, int]) -> dict[str, float]:
    """Save the teacher, a DINOv2 that makes 4x4 patch tokens of a frame of 32 px."""
    import torch

    from miniature import models as small
    from miniature import moving_models as moving
    from miniature.moving import load_digits

    train, val = load_digits(out, "train"), load_digits(out, "val")
    teacher = moving.train_teacher(*train, steps["teacher"])
    teacher.save_pretrained(folder)
    small.write_preprocessor(folder, small.IMAGENET_MEAN, small.IMAGENET_STD)
    known, shown = (
        small.teacher_tokens(teacher, moving.some_frames(digits, torch.arange(len(digits))))
        for digits, _ in (train, val)
    )
    return {
        "teacher_linear_probe": small.measure_linear_probe((known, train[1]), (shown, val[1])),
        "teacher_token_cosine": small.measure_token_cosine(shown),
    }


def make_digit_judge(out: Path, folder: Path, steps: dict[str, int]) -> dict[str, float]:
    """Save the ResNet that judges which digit a frame shows; it shares neither architecture nor seed with the teacher."""
    import torch

    from miniature import models as small
    from miniature import moving_models as moving
    from miniature.moving import load_digits

    judge = moving.train_digit_judge(*load_digits(out, "train"), CLASS_NAMES, steps["digit"])
    judge.save_pretrained(folder)
    small.write_preprocessor(folder, small.CLASSIFIER_MEAN, small.CLASSIFIER_STD)
    digits, labels = load_digits(out, "val")
    frames = torch.cat([moving.some_frames(digits, torch.arange(len(digits))) for _ in range(4)])
    return {"digit_accuracy": small.measure_accuracy(judge, frames, labels.repeat(4))}


def make_motion_judge(out: Path, folder: Path, steps: dict[str, int]) -> dict[str, float]:
    """Save the VideoMAE that judges which motion a clip shows."""
    from miniature import models as small
    from miniature import moving_models as moving
    from miniature.moving import load_digits

    judge = moving.train_motion_judge(load_digits(out, "train")[0], steps["motion"])
    judge.save_pretrained(folder)
    small.write_preprocessor(folder, small.CLASSIFIER_MEAN, small.CLASSIFIER_STD)
    return {"motion_accuracy": moving.measure_motion_accuracy(judge, load_digits(out, "val")[0])}


# The order follows the cost of the models, so that two processes finish at about the same time.
MODELS: dict[str, Callable[[Path, Path, dict[str, int]], dict[str, float]]] = {
    "ltx-moving": make_ltx,
    "dinov2-moving": make_teacher,
    "digit-judge": make_digit_judge,
    "motion-judge": make_motion_judge,
}
