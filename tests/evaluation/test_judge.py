"""A judge over HTTP with a scripted server: malformed, slow, refused and out-of-range replies are counted."""

import json
import math
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from ip2p.base.errors import InputError, ModelError
from ip2p.evaluation.judge import (
    FAILURES,
    JudgeSettings,
    VisionJudge,
    count_failures,
    parse_score_lines,
    parse_scores,
)
from ip2p.evaluation.metrics import Shot
from ip2p.synth.server import server_key

GOOD = '{"score": [8, 6], "reasoning": "fine"}'
SLOW = 1.0


@pytest.fixture()
def server():
    """A server whose `script` maps a word in the prompt to a reply, an error status or a delay."""
    script, seen = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = body["messages"][0]["content"]
            text = content[0]["text"]
            seen.append((body, self.headers.get("Authorization")))
            answer = next((value for word, value in script.items() if word in text), GOOD)
            status, message = 200, {"role": "assistant", "content": answer}
            if answer == "slow":
                time.sleep(SLOW)
            if answer == "refusal":
                message = {"role": "assistant", "content": None, "refusal": "no"}
            if isinstance(answer, int):
                status = answer
            data = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
            data["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
            raw = json.dumps(data if status == 200 else {"error": {"message": "broken"}}).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)
            except BrokenPipeError:
                pass

        def log_message(self, *arguments):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1", script, seen
    http.shutdown()


def shots(*instructions, kind=""):
    picture = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0))
    return [Shot(before=picture, output=picture, instruction=text, kind=kind) for text in instructions]


def test_every_kind_of_bad_reply_is_counted_and_scored_as_nan(server):
    url, script, _ = server
    script |= {
        "MALFORMED": "eight out of ten",
        "TRUNCATED": '{"score": [8, ',
        "THREE": '{"score": [8, 6, 7]}',
        "WORDS": '{"score": ["8", "6"]}',
        "TWICE": GOOD + '{"score": [1, 1]}',
        "LYING": '{"score": [11, 6]}',
        "NEGATIVE": '{"score": [-1, 6]}',
        "SORRY": "I'm sorry, I cannot judge this picture.",
        "REFUSE": "refusal",
        "SLOW": "slow",
        "BROKEN": 500,
        "EMPTY": "",
    }
    judge = VisionJudge(JudgeSettings(server=url, model="m", timeout=SLOW / 2))
    found = judge(shots("make it GOOD", *script))
    assert found[0]["judge_semantics"] == 6 and found[0]["judge_failures"] == "{}"
    assert found[0]["judge_overall"] == pytest.approx(6)
    for each in found[1:]:
        assert math.isnan(each["judge_semantics"]) and math.isnan(each["judge_overall"])
        assert each["judge_quality"] == 6, "the other question was answered"
    counts = count_failures(found)
    assert counts["failures"] == {
        "malformed": 6, "out of range": 2, "refused": 2, "timed out": 1, "server error": 1
    }  # fmt: skip
    assert counts["replies"] == 2 * 13 and len(counts["dates"]) == 1
    assert set(counts["failures"]) == set(FAILURES)


def test_repeats_give_the_mean_and_spread_of_the_readable_replies(server):
    url, script, seen = server
    answers = iter(['{"score": [4, 9]}', "nothing", '{"score": [9, 9]}'])
    lock = threading.Lock()

    judge = VisionJudge(JudgeSettings(server=url, model="m", repeats=3))
    original_reply = judge._reply

    def reply(prompt, pictures):
        if "VARIES" in prompt:
            with lock:
                script["VARIES"] = next(answers)
                return original_reply(prompt, pictures)
        return original_reply(prompt, pictures)

    judge._reply = reply
    (found,) = judge(shots("VARIES"))
    assert found["judge_semantics"] == pytest.approx(6.5)
    assert json.loads(found["judge_failures"]) == {"malformed": 1} and found["judge_replies"] == 6
    overall = sorted([math.sqrt(4 * 6), math.sqrt(9 * 6)])
    assert found["judge_overall"] == pytest.approx(sum(overall) / 2)
    assert found["judge_spread"] == pytest.approx((overall[1] - overall[0]) / math.sqrt(2))
    assert all(body["temperature"] == 1.0 for body, _ in seen)


def test_the_server_gets_both_pictures_the_instruction_and_the_key(server):
    url, _, seen = server
    VisionJudge(JudgeSettings(server=url, model="m", key="secret"))(shots("make it night"))
    by_count = {len(body["messages"][0]["content"]): body for body, _ in seen}
    assert set(by_count) == {2, 3}, "quality sees the result alone"
    assert "make it night" in by_count[3]["messages"][0]["content"][0]["text"]
    assert "make it night" not in by_count[2]["messages"][0]["content"][0]["text"]
    assert Counter(key for _, key in seen) == {"Bearer secret": 2}
    assert "secret" not in repr(JudgeSettings(server=url, model="m", key="secret"))


@pytest.mark.parametrize("status", [401, 404])
def test_an_unknown_key_or_model_ends_the_run(server, status):
    url, script, _ = server
    script["night"] = status
    with pytest.raises(ModelError, match="does not accept requests"):
        VisionJudge(JudgeSettings(server=url, model="m"))(shots("night"))


def test_an_unreachable_server_ends_the_run():
    with pytest.raises(ModelError, match="does not accept requests"):
        VisionJudge(JudgeSettings(server="http://127.0.0.1:9/v1", model="m"))(shots("night"))


def test_text_around_the_json_is_ignored():
    assert parse_scores(f"Sure.\n```json\n{GOOD}\n```", 2) == [8, 6]
    assert parse_scores(GOOD + "\n" + GOOD, 2) == [8, 6], "said twice alike"
    assert parse_scores('{"score": [true, 6]}', 2) == "malformed"
    assert parse_scores("[8, 6]", 2) == "malformed"


def test_imgedit_lines_need_three_scores_from_one_to_five():
    good = "Brief reasoning: fine\nPrompt Compliance: 4\nVisual Naturalness: 5/5\nDetail Integrity: 3"
    assert parse_score_lines(good) == [4, 5, 3]
    assert parse_score_lines(good.replace(": 4", ": 12")) == "out of range"
    assert parse_score_lines("Prompt Compliance: 4") == "malformed"
    assert parse_score_lines("I cannot help with that: sorry") == "refused"


def test_prompts_from_a_folder_replace_the_built_in_ones(tmp_path):
    (tmp_path / "semantics.txt").write_text("Judge: {instruction}")
    settings = JudgeSettings(server="http://x", model="m", prompts=tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        settings.texts()
    (tmp_path / "quality.txt").write_text("Good?")
    assert settings.texts() == {"semantics": "Judge: {instruction}", "quality": "Good?"}
    (tmp_path / "semantics.txt").write_text("Judge it")
    with pytest.raises(InputError, match="does not contain {instruction}"):
        settings.texts()


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("IP2P_API_KEY", "one")
    monkeypatch.setenv("MINE", "two")
    assert server_key(None) == "one" and server_key("MINE") == "two"
    with pytest.raises(InputError, match="no NOWHERE"):
        server_key("NOWHERE")
