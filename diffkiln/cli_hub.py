"""The commands that talk to the Hugging Face Hub, whose client shows the progress of large files.

There is no option for a token: other users can see command lines.
"""

from __future__ import annotations

from pathlib import Path

import click

from diffkiln.errors import Incompatible
from diffkiln.printing import print_json, say, show, size_of


@click.command("push")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for a program to read.")
def push_(bundle: Path, repo: str, private: bool, as_json: bool) -> None:
    """Publish BUNDLE on the Hugging Face Hub as REPO (owner/name), in one commit. Log in with `hf auth login`."""
    from diffkiln.hub import push

    pushed = push(bundle, repo, private=private)
    if as_json:
        print_json({"repo": repo, "commit": pushed.commit, "sent": pushed.sent, "removed": pushed.removed})
        return
    say(f"{len(pushed.sent)} files sent, {len(pushed.removed)} removed")
    show(f"hf://{repo}@{pushed.commit}")


@click.command("pull")
@click.argument("repo")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory to make.")
@click.option("--revision", default="main", show_default=True, help="Branch, tag or commit.")
@click.option("--target", "names", multiple=True, help="Fetch the engines for this target; may be given again.")
@click.option("--all-targets", is_flag=True, help="Fetch the engines for every target.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for a program to read.")
def pull_(
    repo: str, output: Path, revision: str, names: tuple[str, ...], all_targets: bool, force: bool, as_json: bool
) -> None:
    """Fetch the bundle REPO (owner/name) from the Hugging Face Hub, with the engines that fit this machine."""
    if names and all_targets:
        raise click.BadOptionUsage("--target", "--target and --all-targets exclude each other")
    from diffkiln.bundle import Manifest, engine_targets
    from diffkiln.hub import only, pull

    def fitting(manifest: Manifest) -> tuple[str, ...]:
        from diffkiln.runtime.targets import fitting_targets

        try:
            return fitting_targets(manifest)
        except Incompatible as error:
            mend = "To pull for another machine, name its target with --target, or take all with --all-targets"
            raise Incompatible(f"{error}\n{mend}", problems=error.problems) from error

    received = 0

    def count(size: int) -> None:
        nonlocal received
        received += size

    choose = engine_targets if all_targets else only(names) if names else fitting
    pulled = pull(repo, output, revision=revision, choose=choose, force=force, progress=count)
    if as_json:
        told = {"path": str(pulled.path), "id": pulled.id, "commit": pulled.commit, "targets": pulled.targets}
        print_json(told | {"received_bytes": received})
        return
    say(f"{size_of(received)} received; commit {pulled.commit}; engines for {', '.join(pulled.targets) or 'no target'}")
    show(f"{pulled.path}  {pulled.id}")
