"""Draw the images of a run: fixed seeds, balanced labels, one folder for each setting, only what is missing."""

import json
from pathlib import Path

from tqdm import tqdm

from build_sd15 import load_run_model, sampling_scheduler
from device import pick_device
from evaluation.plots import plot_sample_grids
from evaluation.sampling import (
    balanced_labels,
    decode_latents,
    image_path,
    load_images,
    sample_latents,
    save_images,
)
from files import write_json
from models.base_model import load_part
from preprocessing.manifest import read_manifest, read_table
from training.run_folder import RunFolder, this_command

GRID_IMAGES = 100


def draw_samples(run: RunFolder, protocol: dict, device_name: str) -> Path:
    """Draw the images of a protocol that are missing, and the picture of the first of them; returns their folder."""
    folder = run.path / "samples" / setting_name(protocol)
    missing = [i for i in range(protocol["num_samples"]) if not image_path(folder, i).is_file()]
    if missing:
        _generate(run, protocol, missing, folder, device_name)
    if missing or not (folder / "grid.png").exists():
        columns = min(manifest_of(folder)["n_classes"], 10)
        shown = load_images(folder, min(GRID_IMAGES, protocol["num_samples"]))
        plot_sample_grids(folder / "grid.png", {f"{run.name}, step {protocol['step']}": shown}, columns)
    print(f"{folder}: {protocol['num_samples']} images")
    return folder


def _generate(run: RunFolder, protocol: dict, missing: list[int], folder: Path, device_name: str) -> None:
    """Sample and write the missing images, batch by batch."""
    config, device = run.config, pick_device(device_name)
    model, parameterization = load_run_model(run, protocol["step"], device, weights=protocol["weights"])
    vae = load_part(config.model.base, "vae", config.model.revision).to(device).eval()
    scheduler = sampling_scheduler(config, parameterization)
    table, text_manifest = read_table(config.data.text)
    text, null_text = (
        table[:-1].float().to(device),
        table[-1].float().to(device),
    )  # (n_classes, 77, 768), (77, 768)
    labels = balanced_labels(protocol["num_samples"], len(text))
    shape = read_manifest(config.data.latents, "latents")["shape"]
    write_json(
        folder / "manifest.json",
        protocol
        | {"n_classes": len(text), "prompts": text_manifest["details"]["prompts"], "base": config.model.base}
        | {
            "timestep_spacing": "trailing",
            "eta": 0.0,
            "parameterization": parameterization,
            "command": this_command(),
        },
    )
    size = config.eval.batch_size
    batches = [missing[start : start + size] for start in range(0, len(missing), size)]
    for indices in tqdm(batches, desc=f"sample {run.name}", unit="batch"):
        latents = sample_latents(
            model.unet,
            scheduler,
            text[[labels[i] for i in indices]],
            null_text,
            [protocol["seed"] + i for i in indices],
            shape=shape,
            steps=protocol["sampling_steps"],
            cfg=protocol["cfg"],
            guidance_high=protocol["guidance_high"],
            guidance_space=protocol["guidance_space"],
        )
        save_images(decode_latents(vae, latents), folder, indices)


def setting_name(protocol: dict) -> str:
    p = protocol
    only = "" if p["guidance_high"] == 1 else f"-{p['guidance_space']}{p['guidance_high']:g}"
    return (
        f"step{p['step']:07d}_{p['weights']}_{p['sampler']}{p['sampling_steps']}_cfg{p['cfg']:g}{only}"
        f"_seed{p['seed']}_n{p['num_samples']}"
    )


def manifest_of(folder: Path) -> dict:
    """What `draw_samples` recorded about a folder of samples."""
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
