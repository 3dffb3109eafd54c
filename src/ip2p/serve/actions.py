"""What the buttons of the page do, without a word of how the page looks.

An action returns the values of the fields that it changes, by name (`ip2p.serve.ui` has the names); a long
one yields such values while it works. Errors that a user can cause are raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import html
import itertools
import os
import time
import zipfile
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyio import to_thread
from PIL import Image

from ip2p.base.errors import InputError, Ip2pError, ResourceError
from ip2p.editing import grid
from ip2p.pictures.images import load_image, resized, save_image
from ip2p.pictures.infotext import EditRecord, parse_infotext, read_infotext
from ip2p.serve.queue import Full
from ip2p.serve.run import Controls, duration, from_settings, progress, run, surprise
from ip2p.serve.session import Session, for_browser, kept_ending, show, store, uploaded
from ip2p.settings import MAX_SCALE, EditSettings, SettingError

if TYPE_CHECKING:
    from ip2p.serve.jobs import Job
    from ip2p.serve.requests import EditRequest
    from ip2p.serve.service import Service

Values = dict[str, Any]
OFTEN = 0.2  # seconds between two signs of life: more would be work for every browser and nobody's gain
CELL = 256  # the longer side of a cell of the matrix
AT_ONCE = 4  # requests of one browser that are in the service together
MAX_CELLS, MAX_FILES = 25, 200
# Matrices and batches at once, of one client and of all: what they ask for waits where there is no room.
LONG_OF_CLIENT, LONG_OF_ALL = 4, 32
# What stands above the fields, where it is not their name with a capital.
LABELS = {
    "image": "Picture",
    "instruction": "Instruction",
    "negative": "Negative prompt",
    "seeds": "Candidates or seed",
    "steps": "Steps",
    "sampler": "Sampler",
    "schedule": "Noise levels",
    "text_cfg": "Text CFG",
    "image_cfg": "Image CFG",
    "size": "Size",
    "mask": "Mask",
    "auto_mask": "Threshold",
    "model": "Model",
}


class Actions:
    """The actions over one service."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._long: Counter[str] = Counter()

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
        from ip2p_storybook.draw import draw  # brings the drawing library
        from ip2p_storybook.edits import sample_edit
        from ip2p_storybook.scene import rng_for

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
        return self.state(session) | {"status": say("Say what to change next, or undo."), "instruction": ""}

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
        if step.drawn is not None:
            fields |= {"region": "file", "mask": str(step.drawn)}
        session.history.undo()
        return self._moved(session) | fields

    def _moved(self, session: Session) -> Values:
        session.forget()
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
            "download": str(session.download(chosen)),
        }

    # --- for programs -----------------------------------------------------------------------------------

    async def edit_once(
        self, path: str | None, controls: Controls, client: str
    ) -> tuple[list[str], list[dict[str, Any]]]:
        """The candidates for one picture as files in its format, and the settings of each."""
        if path is None:
            raise InputError("picture is missing. Send one.")
        with contextlib.closing(Session()) as session:

            def request() -> EditRequest:
                session.open(path, max_pixels=self.service.limits.pixels)
                return controls.request(session.picture(), previews=0)

            job = await self._one(session, request, client, session.stops)
            if job is None or job.state != "done":
                raise InputError("The edit was stopped.")
            await to_thread.run_sync(session.keep, [result.image for result in job.results])
            files = [str(await to_thread.run_sync(session.download, made)) for made in session.candidates]
            return files, [settings_as_json(made.parameters) for made in session.candidates]

    async def batch_once(
        self, paths: Sequence[str], controls: Controls, client: str
    ) -> tuple[list[str], list[str]]:
        """The zip of `batch`, and the lines of what could not be edited."""
        with contextlib.closing(Session()) as session:
            last: Values = {}
            async with contextlib.aclosing(self.batch(session, controls, client, paths)) as told:
                async for values in told:
                    last |= values
            return [last["zip"]] if last["zip"] else [], last["failed"]

    def settings_of(self, path: str | None) -> dict[str, Any]:
        """What an edited file was made with, by the names of the controls."""
        if path is None:
            raise InputError("settings_file is missing. Send a picture that ip2p edited.")
        return settings_as_json(self._read(path))

    # --- settings -------------------------------------------------------------------------------------

    def take(self, session: Session) -> Values:
        """The settings that the dropped picture carries."""
        text = session.history.current.parameters
        if not text:
            raise InputError("This picture carries no settings. Drop one that ip2p edited.")
        return self._taken(parse_infotext(text))

    def take_from(self, path: str) -> Values:
        """The settings that an edited file carries."""
        return self._taken(parse_infotext(self._read(path)))

    def _taken(self, settings: EditRecord) -> Values:
        words = "Settings loaded."
        if settings.mask is not None and settings.auto_mask is None:
            words += " The mask is not in the file: paint it below “Where”, or give its file there."
        return from_settings(settings, self.service.models) | {"status": say(words)}

    def _read(self, path: str) -> str:
        try:
            text = read_infotext(path)
        except InputError:
            raise InputError("The file is no PNG, JPEG or WebP picture. Give one that ip2p edited.") from None
        if text is None:
            raise InputError(f"{Path(path).name} carries no settings. Give a picture that ip2p edited.")
        return text

    def own(self, model: str | None) -> Values:
        """The settings that a model recommends."""
        card = self.service.card(model or None)
        return {
            "text_cfg": card.text_cfg,
            "image_cfg": card.image_cfg,
            "steps": min(card.steps, self.service.limits.steps),
            "sampler": card.sampler,
            "spacing": card.schedule,
        }

    def surprise(self, model: str | None) -> Values:
        """Scales around the model's own ones, and a random seed."""
        card = self.service.card(model or None)
        text_cfg, image_cfg = surprise((card.text_cfg, card.image_cfg))
        return {"text_cfg": text_cfg, "image_cfg": image_cfg, "seed": -1}

    def axes(self, model: str | None) -> Values:
        """The values of the matrix around the model's own scales, as `ip2p grid` takes them."""
        settings = EditSettings().resolved(self.service.card(model or None))
        return {
            name: " ".join(f"{value:g}" for value in grid.default_values(setting, settings))
            for name, setting in (("columns", "text_cfg"), ("rows", "image_cfg"))
        }

    # --- editing --------------------------------------------------------------------------------------

    async def edit(self, session: Session, controls: Controls, client: str) -> AsyncGenerator[Values, None]:
        """Make candidates, with their pictures on the way and the time left."""
        step, stops = session.history.current, session.stops
        await to_thread.run_sync(session.check_space)
        # A place first: no picture is decoded for a request that is then refused.
        with session.at_work() as folder, self.service.room(client) as place:
            picture = await to_thread.run_sync(session.picture)
            request = await to_thread.run_sync(controls.request, picture)
            session.forget()
            yield self.results(session) | {"status": say("Waiting"), "session": session}
            if session.stops != stops:
                yield {"status": say("Stopped.")}
                return
            told, drawn = 0.0, -1
            async with contextlib.aclosing(run(self.service, request, client=client, place=place)) as news:
                async for job in news:
                    self._mine(session, job, stops)
                    now = time.monotonic()
                    if not job.active or now - told < OFTEN:
                        continue
                    told = now
                    values: Values = {"status": bar(job)}
                    if any(job.previews) and drawn != job.step:
                        drawn = job.step
                        values["candidates"] = await to_thread.run_sync(self._previews, folder, job)
                    yield values
            session.jobs.discard(job.id)
            if job.error is not None:
                raise job.error
            if job.state == "cancelled":
                yield {"status": say("Stopped."), "candidates": []}
                return
            keep = functools.partial(session.keep, drawn=request.settings.mask, of=step)
            if not await to_thread.run_sync(keep, [result.image for result in job.results]):
                yield {"status": say("The picture was changed meanwhile. Run the edit again.")}
                return
            values = await to_thread.run_sync(self.results, session)
            count = len(job.results)
            yield values | {"status": say("Done. Compare, and continue from one." if count > 1 else "Done.")}

    def _mine(self, session: Session, job: Job, stops: int) -> None:
        """Have Stop reach a job, also where it was pressed before there was one."""
        session.jobs.add(job.id)
        if session.stops != stops:
            self.service.cancel(job.id)

    def _previews(self, folder: Path, job: Job) -> list[tuple[str, str]]:
        count = len(job.previews)
        return [
            (str(show(preview, folder / f"preview-{k}.webp", CELL)), f"{k} of {count}")
            for k, preview in enumerate(job.previews, 1)
            if preview is not None
        ]

    async def matrix(
        self, session: Session, controls: Controls, client: str, columns: str, rows: str
    ) -> AsyncGenerator[Values, None]:
        """Edit once for each pair of a text CFG (columns) and an image CFG (rows), all with one seed."""
        across, down = read_numbers("Text CFG", columns), read_numbers("Image CFG", rows)
        pairs = [(text, image) for image in down for text in across]
        if len(pairs) > MAX_CELLS:
            raise InputError(
                f"The matrix has {len(pairs)} cells; it may have {MAX_CELLS}. Give fewer values."
            )
        with self._turn(client), session.at_work() as folder:
            picture = await to_thread.run_sync(session.picture)
            first = dataclasses.replace(controls, count=1)
            base = await to_thread.run_sync(lambda: first.request(picture, previews=0))
            # Its cells are small: the photograph's own pixels would not be seen.
            requests = [
                dataclasses.replace(
                    base, settings=base.settings.changed(text_cfg=text, image_cfg=image, fit="model")
                )
                for text, image in pairs
            ]
            labels = [f"text {text:g} · image {image:g}" for text, image in pairs]
            cells: dict[int, Image.Image] = {}
            mark = None
            session.cells = {}
            share = min(1, CELL / max(picture.size))
            size = (max(1, round(picture.width * share)), max(1, round(picture.height * share)))
            blank = str(show(Image.new("RGB", size, "#9ca3af"), folder / "blank.webp", CELL))
            shown = [blank] * len(pairs)
            took = Took(len(pairs))
            yield {
                "cells": (list(zip(shown, labels, strict=True)), len(across)),
                "sheet": None,
                "status": measure(f"0 of {len(pairs)} cells", 0, len(pairs)),
                "session": session,
            }
            async with contextlib.aclosing(self._all(session, requests, client)) as made:
                async for number, job in made:
                    if isinstance(job, Ip2pError):
                        raise job
                    [result] = job.results
                    cells[number] = resized(result.image.convert("RGB"), size)
                    mark = result.image.info.get("xmp")
                    session.cells[number] = result.image.info["parameters"]
                    shown[number] = str(show(cells[number], folder / f"cell-{number}.webp", CELL))
                    yield {
                        "cells": (list(zip(shown, labels, strict=True)), len(across)),
                        "status": measure(
                            f"{len(cells)} of {len(pairs)} cells{took(len(cells))}", len(cells), len(pairs)
                        ),
                    }
            if len(cells) < len(pairs):
                yield {"status": say("Stopped.")}
                return

            def draw() -> str:
                whole = grid.draw_sheet(
                    [[cells[y * len(across) + x] for x in range(len(across))] for y in range(len(down))],
                    columns=[f"text CFG {value:g}" for value in across],
                    rows=[f"image CFG {value:g}" for value in down],
                    title=f"“{base.settings.instruction}”",
                    picture=resized(picture, size),
                )
                whole.info["xmp"] = mark
                return str(save_image(whole, for_browser(f"{Path(session.source).stem}-grid.png")))

            yield {
                "status": say("Done. Click a cell to take its settings."),
                "sheet": await to_thread.run_sync(draw),
            }

    def cell(self, session: Session, number: int) -> Values:
        """The settings of a cell of the matrix."""
        if number not in session.cells:
            raise InputError("That cell is not made yet. Wait for it, or choose another one.")
        made = parse_infotext(session.cells[number])
        return {
            "text_cfg": made.text_cfg,
            "image_cfg": made.image_cfg,
            "seed": made.seed,
            "status": say(
                f"Taken over: text CFG {made.text_cfg:g}, image CFG {made.image_cfg:g}, seed {made.seed}."
            ),
        }

    async def batch(
        self, session: Session, controls: Controls, client: str, paths: Sequence[str]
    ) -> AsyncGenerator[Values, None]:
        """Edit every file once, with its own seed, into a zip where each keeps its name."""
        if not paths:
            raise InputError("There are no files yet. Drop the pictures to edit.")
        if len(paths) > MAX_FILES:
            raise InputError(
                f"There are {len(paths)} files; a batch takes {MAX_FILES}. Give fewer at a time."
            )
        if controls.region in ("painted", "file"):
            raise InputError(
                "A mask belongs to one picture. For many, edit everywhere or let the model find it."
            )
        with self._turn(client), session.at_work() as folder:
            async with contextlib.aclosing(self._zipped(session, controls, client, paths, folder)) as told:
                async for values in told:
                    yield values

    async def _zipped(
        self, session: Session, controls: Controls, client: str, paths: Sequence[str], folder: Path
    ) -> AsyncGenerator[Values, None]:
        names = kept_names([Path(path).name for path in paths])
        count = len(paths)
        controls = dataclasses.replace(controls, count=1)
        first = controls.seeds()[0]
        sources = await to_thread.run_sync(held, paths, folder)

        def request(number: int) -> EditRequest:
            picture = load_image(uploaded(sources[number]), max_pixels=self.service.limits.pixels)
            return dataclasses.replace(controls, seed=first + number).request(picture, previews=0)

        failed: dict[int, str] = {}
        took = Took(count)
        done = 0
        yield {
            "status": measure(f"0 of {count} files", 0, count),
            "zip": None,
            "errors": "",
            "session": session,
        }
        # Pictures are compressed already.
        made_at = folder / "edited.zip"
        with zipfile.ZipFile(made_at, "w", zipfile.ZIP_STORED) as archive:

            def keep(name: str, result: Image.Image) -> None:
                file = save_image(result, folder / f"result{Path(name).suffix}")
                archive.write(file, name)
                file.unlink()

            async with contextlib.aclosing(
                self._all(session, [functools.partial(request, k) for k in range(count)], client)
            ) as made:
                async for number, job in made:
                    if isinstance(job, Ip2pError):
                        failed[number] = f"{Path(paths[number]).name}: {job}"
                    else:
                        await to_thread.run_sync(keep, names[number], job.results[0].image)
                    done += 1
                    yield {
                        "status": measure(f"{done} of {count} files{took(done)}", done, count),
                        "errors": listed(failed),
                    }
            if failed:
                archive.writestr("errors.txt", "\n".join(failed[k] for k in sorted(failed)) + "\n")
        good = done - len(failed)
        words = f"{good} of {count} edited" + (f", {len(failed)} could not be." if failed else ".")
        if done < count:
            words = f"Stopped. {words}"
        zipped = made_at.rename(for_browser("edited.zip")) if good else None
        yield {
            "status": say(words),
            "errors": listed(failed),
            "failed": [failed[number] for number in sorted(failed)],
            "zip": None if zipped is None else str(zipped),
        }

    @contextlib.contextmanager
    def _turn(self, client: str) -> Iterator[None]:
        """Count a matrix or a batch while it runs. Raises ResourceError for one too many."""
        whose = None
        if self._long[client] >= LONG_OF_CLIENT:
            whose = f"{LONG_OF_CLIENT} of your"
        elif self._long.total() >= LONG_OF_ALL:
            whose = f"{LONG_OF_ALL}"
        if whose is not None:
            raise ResourceError(
                f"{whose} matrices and batches run already, which is the limit. Wait for one to end."
            )
        self._long[client] += 1
        try:
            yield
        finally:
            self._long -= Counter([client])

    async def _all(
        self, session: Session, requests: Sequence[EditRequest | Callable[[], EditRequest]], client: str
    ) -> AsyncGenerator[tuple[int, Job | Ip2pError], None]:
        """The job of each request with its number, as they end, until they are stopped."""
        stops, numbers = session.stops, iter(range(len(requests)))
        running: dict[asyncio.Task[Job | None], int] = {}
        try:
            while True:
                while (
                    len(running) < AT_ONCE
                    and session.stops == stops
                    and (k := next(numbers, None)) is not None
                ):
                    running[asyncio.create_task(self._in_turn(session, requests[k], client, stops))] = k
                if not running:
                    return
                ended, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    number = running.pop(task)
                    try:
                        job = task.result()
                    except Ip2pError as error:
                        yield number, error
                        continue
                    if job is not None and job.state == "done":
                        yield number, job
        finally:
            for task in running:
                task.cancel()

    async def _in_turn(
        self, session: Session, request: EditRequest | Callable[[], EditRequest], client: str, stops: int
    ) -> Job | None:
        """`_one`, which waits where the service is full."""
        while session.stops == stops:
            try:
                return await self._one(session, request, client, stops)
            except Full as full:
                seconds = min(full.retry_after, 5)
            await asyncio.sleep(seconds)  # without the picture, which `_one` had decoded
        return None

    async def _one(
        self, session: Session, request: EditRequest | Callable[[], EditRequest], client: str, stops: int
    ) -> Job | None:
        """The ended job of a request; None where it was stopped before that.

        Raises Full where there is no room for it, before it is decoded, and other Ip2pErrors.
        """
        with self.service.room(client) as place:
            ready = await to_thread.run_sync(request) if callable(request) else request
            if session.stops != stops:
                return None
            async with contextlib.aclosing(run(self.service, ready, client=client, place=place)) as news:
                async for job in news:
                    self._mine(session, job, stops)
        session.jobs.discard(job.id)
        if job.error is not None:
            raise job.error
        return job

    def stop(self, session: Session) -> Values:
        """Cancel whatever runs for this browser; it ends within a step."""
        session.stops += 1
        for job in list(session.jobs):
            self.service.cancel(job)
        return {"status": say("Stopping …" if session.running else "Nothing is running.")}


def say(words: str) -> str:
    """A line of the status, which screen readers read out."""
    return f'<p class="said">{html.escape(words)}</p>'


def complain(error: Ip2pError) -> str:
    """An error in the status."""
    return f'<p class="said wrong" role="alert">{html.escape(worded(error))}</p>'


def worded(error: Ip2pError) -> str:
    """An error that names a field by what stands above it on the page."""
    words = str(error)
    if isinstance(error, SettingError) and error.field in LABELS and words.startswith(error.field):
        return LABELS[error.field] + words.removeprefix(error.field)
    return words


def bar(job: Job) -> str:
    """Where a job is, in words and as a bar."""
    return measure(progress(job), job.step if job.state == "running" else 0, job.steps)


def measure(words: str, done: float, whole: float) -> str:
    said = html.escape(words)
    shown = f'<progress value="{done:g}" max="{whole:g}" aria-label="{said}"></progress>'
    return f'<p class="said">{said}</p>{shown}'


class Took:
    """Words for the time that is left, from how long the part done took."""

    def __init__(self, whole: int) -> None:
        self.whole, self.start = whole, time.monotonic()

    def __call__(self, done: int) -> str:
        if not done or done == self.whole:
            return ""
        return f" · about {duration((time.monotonic() - self.start) / done * (self.whole - done))} left"


def read_numbers(name: str, text: str) -> list[float]:
    """Numbers between blanks or commas, from 0 to the largest scale. Raises InputError."""
    numbers = []
    for word in text.replace(",", " ").split():
        try:
            number = float(word)
        except ValueError:
            number = -1.0
        if not 0 <= number <= MAX_SCALE:
            raise InputError(
                f"{name} {word!r} is no number from 0 to {MAX_SCALE:g}. Write for example 5 7.5 10."
            )
        numbers.append(number)
    if not numbers:
        raise InputError(f"{name} has no values. Write for example 5 7.5 10.")
    return numbers


def kept_names(names: Sequence[str]) -> list[str]:
    """Names for the results: each its own, in a format that is written; a second one of a name is name-2."""
    taken: set[str] = set()
    kept = []
    for name in map(Path, names):
        suffix = kept_ending(name)
        candidates = (f"{name.stem}{f'-{k}' if k > 1 else ''}{suffix}" for k in itertools.count(1))
        own = next(other for other in candidates if other.lower() not in taken)
        taken.add(own.lower())
        kept.append(own)
    return kept


def held(paths: Sequence[str], folder: Path) -> list[Path]:
    """Second names of uploads in `folder`, which keep them while Gradio deletes the first ones by age."""
    kept = []
    for number, path in enumerate(paths):
        kept.append(folder / f"{number}")
        try:
            os.link(path, kept[-1])
        except OSError:  # of another file system, or gone: then it is told of this one
            kept[-1] = Path(path)
    return kept


def listed(failed: Mapping[int, str]) -> str:
    """What could not be edited, as a list."""
    items = "".join(f"<li>{html.escape(failed[number])}</li>" for number in sorted(failed))
    return f"<ul>{items}</ul>" if items else ""


def settings_as_json(parameters: str) -> dict[str, Any]:
    """The settings of an infotext as JSON holds them."""
    made = dict(parse_infotext(parameters))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in made.items()}


def caption(seed: int, chosen: bool) -> str:
    return f"{'✓ ' if chosen else ''}seed {seed}"


def facts(parameters: str) -> str:
    """The settings of a result in one line."""
    return parameters.splitlines()[-1].split(", Version")[0] if parameters else ""
