"""The assignment of images to shards, stored in `plan.json`.

The assignment is made before the first shard is written. More images may be added to it later, but an image never moves.
"""

from collections.abc import Sequence
from pathlib import Path

from cache.manifest import MANIFEST, SETTINGS, check_same, read_json
from common.errors import UserError
from common.files import write_json

PLAN = "plan.json"
SHARD_SIZE = 10_000


def shard_path(folder: Path, shard: int) -> Path:
    """Return the file path of a complete shard."""
    return folder / f"shard-{shard:05d}.lmdb"


def check_settings(folder: Path, settings: dict, shard_size: int | None) -> dict:
    """Write the settings of a new folder, or check those of an existing one, and return them.

    Raises `UserError` when the folder was made with other settings.
    """
    path = folder / SETTINGS
    if path.exists():
        known = read_json(path)
        check_same(folder, known, settings)
        if shard_size not in (None, known.get("shard_size")):
            raise UserError(
                f"{folder} has shards of {known.get('shard_size')} images: leave --shard-size out"
            )
        return known
    if (folder / PLAN).exists() or (folder / MANIFEST).exists():
        raise UserError(f"{folder} has lost its {SETTINGS}: restore it, or delete the folder")
    settings = settings | {"shard_size": SHARD_SIZE if shard_size is None else shard_size}
    write_json(path, settings)
    return settings


def read_plan(folder: Path) -> list[list[str]]:
    """Return the ids of every shard, in order; the list is empty for a new folder."""
    path = folder / PLAN
    plan = read_json(path).get("shards") if path.exists() else []
    if not isinstance(plan, list) or not all(isinstance(ids, list) for ids in plan):
        raise UserError(f"{path} is damaged: restore it, or delete the folder {folder}")
    return plan


def extend_plan(folder: Path, ids: Sequence[str], shard_size: int) -> list[list[str]]:
    """Add ids to the assignment and return it; ids that are already assigned keep their places.

    The new list must contain every assigned id, or else be a part of them that covers all unfinished shards. Any other list
    probably belongs to another folder, so `UserError` is raised instead of mixing the two.
    """
    plan = read_plan(folder)
    wanted, planned = set(ids), {key for shard in plan for key in shard}
    if wanted <= planned:
        lacking = {
            key for n, shard in enumerate(plan) if not shard_path(folder, n).exists() for key in shard
        } - wanted
    else:
        lacking = planned - wanted
    if lacking:
        raise UserError(
            f"{folder} was begun for other images too ({min(lacking)}, for one): give the list that it was begun with or one "
            "that contains it, or choose another --out"
        )
    if new := [key for key in ids if key not in planned]:
        plan += [new[i : i + shard_size] for i in range(0, len(new), shard_size)]
        write_json(folder / PLAN, {"shards": plan})
    return plan
