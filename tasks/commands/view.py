"""``medvl view``: an image on a page of this machine, with maps of what is typed."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tasks.commands.common import (
    REJECTED,
    check_out_folder,
    echo_notice,
    load_model,
    load_prompt_set,
    prompts_option,
    report_rejected,
    usage_errors,
)
from tasks.commands.scores import decisions_of, familiar_of, score_protocol, scoring_of

if TYPE_CHECKING:
    from reports.prompts import PromptSet
    from tasks.view.content import Viewer, ViewModel
    from tasks.view.studies import Studies

MOST_MODELS = 4


@click.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE|FOLDER")
@click.option(
    "--model", "models", multiple=True, required=True, type=click.Path(path_type=Path), metavar="DIR", help="A model (repeatable)."
)
@click.option("--device", metavar="DEVICE", help="cpu, cuda or cuda:1; CUDA if there is one unless told.")
@prompts_option
@click.option("--phrase", "phrases", multiple=True, metavar="TEXT", help="What to look for at first; of two, side by side (repeatable).")
@click.option("--export", "out", type=click.Path(path_type=Path), metavar="DIR", help="Write a page that needs no server, and end.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen; beyond this machine nothing is encrypted."
)
@click.option("--port", type=click.IntRange(0, 65535), default=0, show_default="a free one", help="Port to listen on.")
@click.option("--no-browser", is_flag=True, help="Print the address and open nothing.")
@click.option("--max-upload", type=click.IntRange(min=1), default=1024, show_default=True, metavar="MIB", help="Most to drop at once.")
@click.pass_context
def view(
    ctx: click.Context,
    path: Path,
    models: tuple[Path, ...],
    device: str | None,
    prompts: Path | None,
    phrases: tuple[str, ...],
    out: Path | None,
    host: str,
    port: int,
    no_browser: bool,
    max_upload: int,
) -> None:
    """Look at a radiograph or a CT in the browser, and see where in it a phrase is, as it is typed.

    FILE is an image that a model reads: a radiograph (DICOM, PNG, JPEG, TIFF), a volume (NIfTI, MHA, NRRD, a zip) or the folder of a DICOM
    series; of any other FOLDER the studies in it are listed to choose from. The page comes from this machine, is for whoever has the
    address with its token, and asks nothing of any network. Two phrases or two models can stand side by side. With --export the page is
    written to a folder and opens from there without this program, with maps of the phrases and of the highest findings.

    \b
    Examples:
      medvl view film.dcm --model demo/model
      medvl view volume.nii.gz --model demo_ct/model --phrase "left pleural effusion"
      medvl view folder/ --model first/model --model second/model --no-browser --port 8080
      medvl view film.dcm --model demo/model --phrase "pneumothorax" --export page
    """
    if not path.exists():
        raise click.UsageError(f"{path}: no such file or folder; expected an image that a model reads, or a folder of them")
    if len(models) > MOST_MODELS:
        raise click.UsageError(f"--model was given {len(models)} times, expected at most {MOST_MODELS}")
    if not all(phrase.strip() for phrase in phrases):
        raise click.UsageError("--phrase is empty")
    if out is not None:
        check_out_folder(out, "--export")
    else:
        from tasks.view.server import import_server

        with usage_errors(ImportError):
            import_server()
    prompt_set = load_prompt_set(prompts)
    folders = list(dict.fromkeys(models))
    loaded = [_view_model(name, folder, device, prompt_set) for name, folder in zip(short_names(folders), folders, strict=True)]
    from tasks.view.content import Viewer
    from tasks.view.studies import Studies

    viewer = Viewer(loaded)
    wanted = [" ".join(phrase.split()) for phrase in dict.fromkeys(phrases)]
    studies = Studies([model.encoder.reader for model in loaded], path, max_upload * 2**20)
    if out is None:
        _serve(viewer, studies, wanted, host, port, no_browser)
        return
    from tasks.view.export import export_page

    rejected = export_page(out, viewer, studies.all, wanted)
    click.echo(f"Open {out / 'index.html'}.")
    report_rejected(rejected, "files")
    echo_notice()
    if rejected:
        ctx.exit(REJECTED)


def short_names(folders: Sequence[Path]) -> list[str]:
    """What models are called: as many of the last parts of their folders as tell them apart, and more than ``model``."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts))):
        names = [Path(*own[-count:]).as_posix() for own in parts]
        if len(set(names)) == len(names) and "model" not in names:
            return names
    return [str(folder) for folder in folders]


def _view_model(name: str, folder: Path, device: str | None, prompts: PromptSet) -> ViewModel:
    """A model with its prompts encoded, and with the decisions beside it where it has some."""
    from tasks.view.content import ViewModel
    from tasks.zero_shot import PromptBank

    encoder = load_model(folder, device)
    bank = scoring_of(encoder, None, prompts, None, None)
    assert isinstance(bank, PromptBank)
    protocol = score_protocol(folder, encoder, None, prompts, bank, None)
    decisions = decisions_of(None, folder, protocol, bank.findings)
    return ViewModel(name, encoder, bank, familiar_of(None, folder, encoder, protocol), decisions)


def _serve(viewer: Viewer, studies: Studies, phrases: list[str], host: str, port: int, no_browser: bool) -> None:
    """Serve the page until interrupted."""
    import secrets
    import webbrowser

    from tasks.view.server import make_app, serve

    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise click.UsageError(f"--host {host} --port {port}: cannot listen there: {error.strerror or error}") from None
    with listening, studies:
        port = listening.getsockname()[1]
        token = secrets.token_urlsafe(32)
        app = make_app(viewer, studies, token=token, host=host, port=port, phrases=phrases)
        shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104 (compared with)
        address = f"http://{shown}:{port}/?token={token}"
        click.echo(f"Open {address}\nCtrl-C ends it.")
        echo_notice()
        if not no_browser:
            webbrowser.open(address)
        try:
            serve(app, host, [listening])
        except KeyboardInterrupt:
            click.echo("ended")
