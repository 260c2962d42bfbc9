"""Commands on pictures: cloak them, train a network that cloaks, attack cloaked ones."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guardsmith.core.console import print_line, warn
from guardsmith.core.errors import UserError

if TYPE_CHECKING:
    from guardsmith.config.recipe import PixelSpec, Recipe

PICTURES = Annotated[
    list[Path], typer.Argument(metavar="IMAGES...", help="Pictures of one subject, or folders of some.")
]
OUTPUT = Annotated[Path, typer.Option("--output", "-o", help="Folder to write; it may not be there yet.")]
RECIPE = Annotated[
    str | None, typer.Option("--recipe", help="Recipe with settings.  [default: avatar-images on the embedded base]")
]
CHANGES = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; may be repeated.")
]
CLASS_NOUN = Annotated[str, typer.Option("--class-noun", help="Class of the subject, as it stands in prompts.")]
IDENTIFIER = Annotated[str, typer.Option("--identifier", help="Attackers' word for the subject.")]
CLASS_IMAGES = Annotated[
    int, typer.Option("--class-images", min=0, help="Pictures of the class for prior preservation.")
]
SEED = Annotated[int, typer.Option(help="Seed of everything random.")]
JSON = Annotated[bool, typer.Option("--json", help="Print the record as JSON.")]


def _recipe(name: str | None, base: str | None, changes: list[str] | None) -> Recipe:
    """The recipe. Without a name it is avatar-images on the embedded base, and the papers' settings on any other."""
    from guardsmith.config.loading import load_recipe
    from guardsmith.config.recipe import Recipe

    if name is None and base is not None and not base.startswith("builtin:"):
        if changes:
            raise UserError("--set changes a recipe; name one with --recipe")
        return Recipe(base=base)
    recipe = load_recipe(name or "avatar-images", changes or [])
    return recipe if base is None else recipe.model_copy(update={"base": base})


def _spec(specs: dict[str, PixelSpec], name: str) -> PixelSpec:
    from guardsmith.config.recipe import PixelSpec

    return specs.get(name) or PixelSpec(name=name)


def cloak(
    images: PICTURES,
    output: OUTPUT,
    class_noun: CLASS_NOUN,
    method: Annotated[str, typer.Option(help="See `guardsmith list cloaks`; or a name in the recipe.")] = "aspl",
    budget: Annotated[
        float | None, typer.Option(help="Largest change of a pixel, of 255.  [default: the method's]")
    ] = None,
    base: Annotated[
        list[str] | None, typer.Option(help="Model to cloak against; may be repeated.  [default: the recipe's]")
    ] = None,
    recipe: RECIPE = None,
    changes: CHANGES = None,
    identifier: IDENTIFIER = "sks",
    class_images: CLASS_IMAGES = 50,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Write cloaked copies of pictures, on which models are hard to personalize; the pictures stay as they are."""
    from pydantic import ValidationError

    from guardsmith.cloaks import find_cloak
    from guardsmith.config.problems import explain
    from guardsmith.core.picture_folders import select_pictures
    from guardsmith.core.progress import quiet_libraries
    from guardsmith.pictures.cloaking import cloak_pictures

    if budget is not None and not 0 < budget <= 255:
        raise UserError(f"--budget {budget:g}: a pixel has 255 values; give more than 0 and at most 255")
    settings = _recipe(recipe, base[0] if base else None, changes)
    spec = _spec(settings.cloaks, method)
    params: dict[str, Any] = spec.params | ({} if budget is None else {"budget": budget})
    config = find_cloak(spec.name).config
    try:
        config(**params)
    except ValidationError as error:
        raise UserError("\n".join(explain(error, f"--method {method}", list(config.model_fields)))) from error
    files, left_out, count = select_pictures(images)
    for sentence in left_out:
        warn(sentence)
    quiet_libraries()
    record = cloak_pictures(
        files, output, bases=base or [settings.base], method=spec.name, params=params, class_noun=class_noun,
        identifier=identifier, class_images=class_images, recipe=settings, seed=seed,
        left_out=left_out,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(record, indent=1))
    else:
        from rich.table import Table

        from guardsmith.reports.terminal import print_table

        table = Table(title=f"cloaked with {spec.name} in {record['seconds']:.1f} s", title_justify="left")
        for heading in ("picture", "largest change of 255", "PSNR, dB", "perceptual distance"):
            table.add_column(heading)
        for each in record["pictures"]:
            ratio = "-" if each["psnr_db"] is None else f"{each['psnr_db']:.1f}"
            table.add_row(each["file"], str(each["largest_change"]), ratio, f"{each['perceptual_distance']:.4f}")
        print_table(table, 100)
    others = f" ({count} entries were left out, see above)" if count else ""
    print_line(f"wrote {len(files)} pictures to {output}{others}; look at {output / 'report' / 'before-after.png'}")
    print_line(
        f"next: guardsmith redteam {shlex.quote(str(output))} --references FOLDER --class-noun {shlex.quote(class_noun)} "
        "--output redteam"
    )


def redteam(
    images: PICTURES,
    output: OUTPUT,
    class_noun: CLASS_NOUN,
    references: Annotated[
        list[Path], typer.Option("--references", help="Other, clean pictures of the subject (files or folders).")
    ],
    purifier: Annotated[
        str, typer.Option(help="See `guardsmith list purifiers`; or a name in the recipe.")
    ] = "diffpure",
    base: Annotated[str | None, typer.Option(help="Model that is personalized.  [default: the recipe's]")] = None,
    recipe: RECIPE = None,
    changes: CHANGES = None,
    attack: Annotated[
        str | None,
        typer.Option(
            help="Label of the recipe's DreamBooth attack, whose settings all attackers have.  [default: dreambooth, if any]"
        ),
    ] = None,
    identifier: IDENTIFIER = "sks",
    class_images: CLASS_IMAGES = 50,
    count: Annotated[int, typer.Option(min=2, help="Pictures that each attacker draws.")] = 16,
    judge: Annotated[
        str | None, typer.Option(help="avatar, dino, clip or face.  [default: avatar on the embedded base, else dino]")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Folder or Hub id of the judge's encoder.")] = None,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Personalize a model on (cloaked) pictures as they are, purified, and purified with decoupling (CDL), and judge it."""
    from pydantic import ValidationError

    from guardsmith.config.problems import explain
    from guardsmith.core.picture_folders import select_pictures
    from guardsmith.core.progress import quiet_libraries
    from guardsmith.metrics import find_judge
    from guardsmith.pictures.cloak_attack import attack_cloaked
    from guardsmith.purifiers import find_purifier

    if judge is not None:
        find_judge(judge)
    settings = _recipe(recipe, base, changes)
    spec = _spec(settings.purifiers, purifier)
    config = find_purifier(spec.name).config
    try:
        config(**spec.params)
    except ValidationError as error:
        raise UserError("\n".join(explain(error, f"--purifier {purifier}", list(config.model_fields)))) from error
    label = attack or "dreambooth"
    attack_spec = settings.verify.attacks.get(label)
    if attack is not None and attack_spec is None:
        raise UserError(f"--attack {label}: the recipe has {', '.join(settings.verify.attacks) or 'no attacks'}")
    if attack_spec is not None and attack_spec.name != "dreambooth":
        raise UserError(f"--attack {label}: that is {attack_spec.name}; name a DreamBooth attack of the recipe")
    files, left_out, _ = select_pictures(images)
    others, references_left_out, _ = select_pictures(references)
    for sentence in (*left_out, *references_left_out):
        warn(sentence)
    quiet_libraries()
    record = attack_cloaked(
        files, others, output, base=settings.base, purifier=spec.name, purifier_params=spec.params,
        params={} if attack_spec is None else attack_spec.params, class_noun=class_noun, identifier=identifier,
        class_images=class_images, count=count, recipe=settings, seed=seed,
        judge=judge or ("avatar" if settings.base.startswith("builtin:") else "dino"), judge_model=judge_model,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(record, indent=1))
    else:
        _print_attackers(record["attackers"])
    print_line(f"wrote {output}; look at {output / 'grid.png'}")


def _print_attackers(attackers: dict[str, Any]) -> None:
    from rich.table import Table

    from guardsmith.reports.terminal import print_table

    table = Table(title="similarity to the references", title_justify="left")
    table.add_column("attacker")
    table.add_column("mean [95 % interval]")
    for name, row in attackers.items():
        similarity = "-"
        if row["similarity"] is not None:
            similarity = f"{row['similarity']:z.2f} [{row['low']:z.2f}, {row['high']:z.2f}]"
        table.add_row(name, similarity)
    print_table(table, 80)


def train_rid(
    pictures: Annotated[
        str, typer.Argument(metavar="PICTURES", help="To train on: a folder, a glob, parquet:FILE or hub:DATASET.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder.")],
    base: Annotated[
        list[str] | None, typer.Option(help="Model to defend against; may be repeated.  [default: the recipe's]")
    ] = None,
    recipe: RECIPE = None,
    changes: CHANGES = None,
    seed: SEED = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after an interruption.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the output folder's earlier run first.")
    ] = False,
    as_json: JSON = False,
) -> None:
    """Train a RID defender, which then cloaks any picture in one pass (guardsmith cloak --method rid)."""
    from guardsmith.core.progress import quiet_libraries
    from guardsmith.pictures.rid_training import DEFENDER, train_defender

    settings = _recipe(recipe, base[0] if base else None, changes)
    quiet_libraries()
    record = train_defender(
        pictures,
        output,
        bases=base or [settings.base],
        params=settings.defender,
        seed=seed,
        resume=resume,
        overwrite=overwrite,
    )
    if as_json:
        typer.echo(json.dumps(record, indent=1))
    file = shlex.quote(str(output / DEFENDER))
    print_line(f"trained on {record['pictures']} pictures in {record['seconds']:.0f} s: {file}")
    print_line(
        f"next: guardsmith cloak IMAGES --method rid --set cloaks.rid.params.defender={file} --class-noun NOUN --output DIR"
    )
