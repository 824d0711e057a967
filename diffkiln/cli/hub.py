"""The commands that talk to the Hugging Face Hub, whose client shows the progress of large files.

There is no option for a token: other users can see command lines.
"""

from __future__ import annotations

from pathlib import Path

import click

from diffkiln.cli.group import FILE, FORCE, JSON
from diffkiln.cli.printing import print_json, say, show, size_of
from diffkiln.errors import Incompatible


@click.command("push")
@click.argument("bundle", type=FILE)
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository private; refuse a public one.")
@JSON
def push_(bundle: Path, repo: str, private: bool, as_json: bool) -> None:
    """Publish BUNDLE on the Hub as REPO.

    REPO is owner/name on the Hugging Face Hub, and is made if it is not there. One commit holds the whole bundle. Log
    in first with `hf auth login`.
    """
    from diffkiln.hub import push

    pushed = push(bundle, repo, private=private)
    if as_json:
        print_json({"repo": repo, "commit": pushed.commit, "sent": pushed.sent, "removed": pushed.removed})
        return
    say(f"{len(pushed.sent)} files sent, {len(pushed.removed)} removed")
    show(f"hf://{repo}@{pushed.commit}")


@click.command("pull")
@click.argument("repo")
@click.option("-o", "--output", type=FILE, required=True, help="Directory of the bundle to make.")
@click.option("--revision", default="main", show_default=True, help="Branch, tag or commit.")
@click.option("--target", "names", multiple=True, help="Fetch the engines for this target; repeatable.")
@click.option("--all-targets", is_flag=True, help="Fetch the engines for every target.")
@FORCE
@JSON
def pull_(
    repo: str, output: Path, revision: str, names: tuple[str, ...], all_targets: bool, force: bool, as_json: bool
) -> None:
    """Fetch the bundle REPO from the Hub.

    REPO is owner/name on the Hugging Face Hub. Only the engines that fit this machine are fetched, unless others are
    asked for. After a failure, the same command fetches what is still missing.
    """
    if names and all_targets:
        raise click.BadOptionUsage("--target", "--target and --all-targets are both given. Remove one of the two")
    from diffkiln.bundle import Manifest, engine_targets
    from diffkiln.hub import only, pull

    def fitting(manifest: Manifest) -> tuple[str, ...]:
        from diffkiln.runtime.targets import fitting_targets

        try:
            return fitting_targets(manifest)
        except Incompatible as error:
            hint = "To pull for another machine, name its target with --target, or take all with --all-targets"
            raise Incompatible(f"{error}\n{hint}", problems=error.problems) from error

    received = 0

    def count(size: int) -> None:
        nonlocal received
        received += size

    choose = engine_targets if all_targets else only(names) if names else fitting
    pulled = pull(repo, output, revision=revision, choose=choose, force=force, progress=count)
    if as_json:
        facts = {"path": str(pulled.path), "id": pulled.id, "commit": pulled.commit, "targets": pulled.targets}
        print_json(facts | {"received_bytes": received})
        return
    say(f"{size_of(received)} received; commit {pulled.commit}; engines for {', '.join(pulled.targets) or 'no target'}")
    show(f"{pulled.path}  {pulled.id}")
