import random

from ip2p_storybook.edits import EDIT_KINDS, sample_edit
from ip2p_storybook.labels import (
    EDIT_SIZES,
    IGNORED,
    PAGE_CLASSES,
    PAGE_SIZES,
    SPOTS,
    THING_CLASSES,
    THING_SIZES,
    edit_labels,
    scene_labels,
)
from ip2p_storybook.scene import Scene, Thing


def read_back(labels):
    """Decode class numbers to the things by spot and the page's fields."""
    fields, things = len(THING_SIZES), {}
    for spot, start in zip(SPOTS, range(0, 6 * fields, fields), strict=True):
        spot_labels = labels[start : start + fields]
        if spot_labels[0] > 0:
            classes = THING_CLASSES.items()
            things[spot] = {f: c[k] for (f, c), k in zip(classes, spot_labels, strict=True)}
        else:
            assert (spot_labels[1:] == IGNORED).all()
    page = {f: c[k] for (f, c), k in zip(PAGE_CLASSES.items(), labels[6 * fields :], strict=True)}
    return things, page


def test_scene_labels_decode_back_to_the_record():
    for number in range(40):
        scene = sample_edit(random.Random(number)).after
        things, page = read_back(scene_labels(scene))
        assert page == {field: getattr(scene, field) for field in PAGE_CLASSES}
        assert things == {
            (t.in_sky, t.slot): {field: getattr(t, field) for field in THING_CLASSES} for t in scene.things
        }


def test_labels_are_within_their_class_counts():
    sizes = [*THING_SIZES * 6, *PAGE_SIZES]
    for kind in EDIT_KINDS:
        edit = sample_edit(random.Random(kind), kind=kind)
        assert len(scene_labels(edit.before)) == len(sizes) and len(edit_labels(edit)) == len(EDIT_SIZES)
        for labels, limits in ((scene_labels(edit.before), sizes), (edit_labels(edit), EDIT_SIZES)):
            assert all(label == IGNORED or 0 <= label < n for label, n in zip(labels, limits, strict=True))
        assert EDIT_KINDS[edit_labels(edit)[0]] == kind


def test_a_global_edit_labels_only_the_new_value():
    edit = sample_edit(random.Random(1), kind="time")
    labels = edit_labels(edit)
    assert (labels[1:-4] == IGNORED).all()
    assert PAGE_CLASSES["time"][labels[-3]] == edit.after.time
    assert [label == IGNORED for label in labels[-4:]] == [True, False, True, True]


def test_an_empty_page_has_nothing_at_any_spot():
    labels = scene_labels(Scene(place="beach"))
    assert read_back(labels)[0] == {}
    one = scene_labels(Scene(place="beach", things=(Thing(kind="cat", colour="red", slot="right"),)))
    assert read_back(one)[0][(False, "right")]["kind"] == "cat"
