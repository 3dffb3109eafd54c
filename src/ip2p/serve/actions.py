"""What the buttons of the page do, without a word of how the page looks.

An action returns the values of the fields that it changes, by name (`ip2p.serve.ui` has the names); a long one
yields such values while it works. Errors that a user can cause are told in the field "status".
"""

from __future__ import annotations

import html
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyio import to_thread
from PIL import Image

from ip2p import grid
from ip2p.errors import InputError, Ip2pError
from ip2p.infotext import parse_infotext, read_infotext
from ip2p.serve.run import Controls, from_settings, progress, run, surprise
from ip2p.serve.session import Session, show, store

if TYPE_CHECKING:
    from ip2p.serve.service import Job, Service

Values = dict[str, Any]
OFTEN = 0.2  # seconds between two signs of life: more would be work for every browser and nobody's gain
CELL = 256  # the longer side of a cell of the matrix
AT_ONCE = 4  # requests of one browser that are in the service together
MAX_CELLS, MAX_FILES = 25, 200


class Actions:
    """The actions over one service."""

    def __init__(self, service: Service) -> None:
        self.service = service

    # --- the picture and the history ---------------------------------------------------------------

    def open(self, session: Session, path: str | None) -> Values:
        """Begin with a picture that was dropped; without one, with nothing."""
        if path is None:
            session.close()
            return self.state(session) | {"status": say("Drop a picture to begin.")}
        session.open(path, max_pixels=self.service.limits.pixels)
        carried = session.history.current.parameters
        words = "This file carries its settings: take them over with “Use its settings”." if carried else ""
        return self.state(session) | {"status": say(words or "Say what to change.")}

    def examples(self) -> list[tuple[Path, str]]:
        """Pages of the storybook that no model was trained on, each with an instruction."""
        from ip2p.storybook.draw import draw  # brings the drawing library
        from ip2p.storybook.edits import sample_edit
        from ip2p.storybook.scene import rng_for

        made = []
        for kind in ("recolour", "place", "put_on"):
            edit = sample_edit(rng_for("examples", kind), kind=kind, split="test")
            file = store() / f"{kind}.png"
            Image.fromarray(draw(edit.before, 256)).save(file)
            made.append((file, edit.instruction))
        return made

    def example(self, session: Session, path: Path, instruction: str) -> Values:
        """Begin with an example and its instruction."""
        return self.open(session, str(path)) | {"instruction": instruction}

    def choose(self, session: Session, number: int) -> Values:
        """Take the candidate of that number into the comparison."""
        if number < len(session.candidates):
            session.chosen = number
        return self.results(session)

    def go_on(self, session: Session) -> Values:
        """Make the chosen candidate the picture that is edited next."""
        session.go_on()
        return self.state(session) | {"status": say("Go on from here, or undo."), "instruction": ""}

    def undo(self, session: Session) -> Values:
        session.history.undo()
        return self._moved(session)

    def redo(self, session: Session) -> Values:
        session.history.redo()
        return self._moved(session)

    def go(self, session: Session, position: int) -> Values:
        """Take the step in hand that stands at `position` of the strip: what is edited next branches off."""
        session.history.go(sorted(session.history.steps)[position])
        return self._moved(session)

    def again(self, session: Session) -> Values:
        """Go to before the step at hand, its settings in the fields, so that it can be run anew."""
        step = session.history.current
        if step.parent is None or not step.parameters:
            raise InputError("The first picture was not made here. Choose a later step to run it again.")
        fields = from_settings(parse_infotext(step.parameters), self.service.models)
        session.history.undo()
        return self._moved(session) | fields

    def _moved(self, session: Session) -> Values:
        session.candidates, session.chosen = [], None
        return self.state(session) | {
            "status": say(f"At step {session.history.label(session.history.current)}")
        }

    def state(self, session: Session) -> Values:
        """All that shows which picture is at hand."""
        history = session.history
        steps = [history.steps[number] for number in sorted(history.steps)]
        here = history.steps.get(history.at) if history.at is not None else None
        return {
            "session": session,
            "picture": None if here is None else str(here.shown),
            "editor": None
            if here is None
            else {"background": str(here.shown), "layers": [], "composite": None},
            "strip": [(str(step.shown), history.label(step)) for step in steps],
            "undo": history.can_undo,
            "redo": history.can_redo,
            "again": here is not None and here.parent is not None,
            "take": here is not None and here.parent is None and bool(here.parameters),
        } | self.results(session)

    def results(self, session: Session) -> Values:
        """The candidates and, beside the picture, the one that was chosen."""
        if session.chosen is None or session.history.at is None:
            return {
                "candidates": [],
                "compare": None,
                "region_found": None,
                "facts": "",
                "go_on": False,
                "download": None,
            }
        chosen = session.candidate()
        return {
            "candidates": [
                (str(made.shown), caption(made.settings.seed, k == session.chosen))
                for k, made in enumerate(session.candidates)
            ],
            "compare": (str(session.history.current.shown), str(chosen.shown)),
            "region_found": None if chosen.mask is None else str(chosen.mask),
            "facts": facts(chosen.parameters),
            "go_on": True,
            "download": str(session.download(chosen.file, chosen.parameters)),
        }

    # --- settings -------------------------------------------------------------------------------------

    def take(self, session: Session) -> Values:
        """The settings that the dropped picture carries."""
        text = session.history.current.parameters
        if not text:
            raise InputError("This picture carries no settings. Drop one that ip2p edited.")
        return from_settings(parse_infotext(text), self.service.models) | {"status": say("Settings loaded.")}

    def take_from(self, path: str) -> Values:
        """The settings that an edited file carries."""
        try:
            text = read_infotext(path)
        except InputError:
            raise InputError("The file is no PNG, JPEG or WebP picture. Give one that ip2p edited.") from None
        if text is None:
            raise InputError(f"{Path(path).name} carries no settings. Give a picture that ip2p edited.")
        return from_settings(parse_infotext(text), self.service.models) | {"status": say("Settings loaded.")}

    def own(self, model: str | None) -> Values:
        """The scales that a model recommends."""
        text_cfg, image_cfg = self.service.scales(model or None)
        return {"text_cfg": text_cfg, "image_cfg": image_cfg}

    def surprise(self, model: str | None) -> Values:
        """Scales around the model's own ones, and a random seed."""
        text_cfg, image_cfg = surprise(self.service.scales(model or None))
        return {"text_cfg": text_cfg, "image_cfg": image_cfg, "seed": -1}

    def axes(self, model: str | None) -> Values:
        """The values of the matrix around the model's own scales, as `ip2p grid` takes them."""
        text_cfg, image_cfg = self.service.scales(model or None)
        return {
            name: " ".join(
                f"{value:g}"
                for value in grid.default_values(setting, text_cfg=text_cfg, image_cfg=image_cfg, seed=0)
            )
            for name, setting in (("columns", "text-cfg"), ("rows", "image-cfg"))
        }

    # --- editing --------------------------------------------------------------------------------------

    async def edit(self, session: Session, controls: Controls, client: str) -> AsyncIterator[Values]:
        """Make candidates, with their pictures on the way and the time left."""
        step = session.history.current
        picture = await to_thread.run_sync(session.picture)
        request = await to_thread.run_sync(controls.request, picture)
        session.candidates, session.chosen = [], None
        yield self.results(session) | {"status": say("Waiting"), "session": session}
        job: Job | None = None
        told, drawn = 0.0, -1
        async for job in run(self.service, request, client=client):
            session.jobs.add(job.id)
            now = time.monotonic()
            if job.state not in ("waiting", "running") or now - told < OFTEN:
                continue
            told = now
            values: Values = {"status": bar(job)}
            if any(job.previews) and drawn != job.step:
                drawn = job.step
                values["candidates"] = await to_thread.run_sync(self._previews, session, job)
            yield values
        assert job is not None
        session.jobs.discard(job.id)
        if job.error is not None:
            raise job.error
        if job.state == "cancelled":
            yield {"status": say("Stopped."), "candidates": []}
            return
        if session.history.at != step.number:  # the picture was changed meanwhile: these belong to another
            yield {"status": say("The picture was changed meanwhile; run the edit again.")}
            return
        await to_thread.run_sync(session.keep, [result.image for result in job.results])
        values = await to_thread.run_sync(self.results, session)
        count = len(job.results)
        yield values | {"status": say("Done. Compare, and go on from one." if count > 1 else "Done.")}

    def _previews(self, session: Session, job: Job) -> list[tuple[str, str]]:
        shown = [preview for preview in job.previews if preview is not None]
        return [
            (
                str(show(preview, session.new("preview.webp"), CELL)),
                f"{k} of {len(job.previews)}, step {job.step}",
            )
            for k, preview in enumerate(shown, 1)
        ]

    def stop(self, session: Session) -> Values:
        """Cancel whatever runs for this browser; it ends within a step."""
        session.stops += 1
        for job in list(session.jobs):
            self.service.cancel(job)
        return {"status": say("Stopping …" if session.jobs else "Nothing is running.")}


def say(words: str) -> str:
    """A line of the status, which screen readers read out."""
    return f'<p class="said">{html.escape(words)}</p>'


def complain(error: Ip2pError) -> str:
    """An error in the status."""
    return f'<p class="said wrong" role="alert">{html.escape(str(error))}</p>'


def bar(job: Job) -> str:
    """Where a job is, in words and as a bar."""
    return measure(progress(job), job.step if job.state == "running" else 0, job.steps)


def measure(words: str, done: float, whole: float) -> str:
    said = html.escape(words)
    return f'<p class="said">{said}</p><progress value="{done:g}" max="{whole:g}" aria-label="{said}"></progress>'


def caption(seed: int, chosen: bool) -> str:
    return f"{'✓ ' if chosen else ''}seed {seed}"


def facts(parameters: str) -> str:
    """The settings of a result in one line."""
    return parameters.splitlines()[-1].split(", Version")[0] if parameters else ""
