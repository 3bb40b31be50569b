"""Does an endpoint say over HTTP what the predictor says, and refuse what is beyond its limits with a sentence?"""

import base64
import io
import pickle
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

import thawline
from tests.kit.endpoints import TASKS, answering, bundle_of
from tests.kit.hostile import pictures
from thawline.cluster.errors import ServeError
from thawline.cluster.serve.endpoint.limits import Limits

KINDS = [
    *("rgb.jpg", "cmyk.jpg", "turned6.jpg", "grey16.png", "alpha.png", "palette_alpha.png", "rgb.webp", "1x1.png"),
    *("1x10000.png", "animated.gif", "rgb.tif"),
]
USABLE = pictures()["rgb.jpg"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with answering(bundle_of(folder)) as (app, _):
        yield TestClient(app)


def post(bundle: Path, limits: Limits | None = None, *, options: dict[str, Any] | None = None, **request: Any) -> Any:
    """The response of an endpoint of its own."""
    with answering(bundle, limits, **(options or {})) as (app, _):
        return TestClient(app).post("/predict", **request)


@pytest.mark.parametrize("task", TASKS)
def test_http_says_what_the_predictor_says(task: str, folder: Path) -> None:
    """One by one, and all at once with broken ones among them, whose reasons are those of the predictor."""
    files = {name: pictures()[name] for name in (*KINDS, "cut5.jpg", "text.jpg")}
    bundle = bundle_of(folder, task)
    with thawline.load(bundle) as predictor:
        expected = predictor.predict(list(files.values()))
    with answering(bundle) as (app, _):
        client = TestClient(app)
        alone = [client.post("/predict", content=data).json() for data in files.values()]
        together = client.post("/predict", files=[("images", item) for item in files.items()]).json()
    for name, said, (one, other) in zip(files, expected, zip(alone, together, strict=True), strict=True):
        assert other["name"] == name
        if said.error is not None:
            assert one == {"error": f"the image cannot be used: {said.error}"}
            assert other["error"] == said.error
            continue
        for answer in (*one, other):
            if said.mask is not None:
                mask = np.array(Image.open(io.BytesIO(base64.b64decode(answer["mask"]))))
                np.testing.assert_array_equal(mask, said.mask)
            if said.points is not None:
                np.testing.assert_allclose(answer["points"], said.points, rtol=1e-5, atol=1e-3)
            elif task == "number":
                assert answer["prediction"] == pytest.approx(said.prediction, abs=1e-5)
            else:
                assert answer["prediction"] == said.prediction
            assert answer.get("probability") == pytest.approx(said.probability, abs=1e-5)
            assert answer.get("probabilities", {}) == pytest.approx(dict(said.probabilities), abs=1e-5)


def test_options_are_the_predictors_and_wrong_ones_get_a_sentence(folder: Path, client: TestClient) -> None:
    (first,) = client.post("/predict?top_k=1", content=USABLE).json()
    assert list(first["probabilities"]) == [first["prediction"]]
    for task, query, told in (
        ("single_label", "threshold=0.5", "threshold=0.5 with task single_label: it is for images with several labels"),
        ("number", "top_k=2", "top_k=2 with task number: it has no probabilities"),
        ("multi_label", "threshold=2", "threshold: Input should be less than or equal to 1"),
        ("multi_label", "top_k=-1", "top_k: Input should be greater"),
    ):
        with answering(bundle_of(folder, task)) as (app, _):
            answer = TestClient(app).post(f"/predict?{query}", content=USABLE)
        assert (answer.status_code, answer.json()["error"][: len(told)]) == (422, told)
    with answering(bundle_of(folder, "multi_label")) as (app, _):
        none, every = (TestClient(app).post(f"/predict?threshold={t}", content=USABLE).json()[0] for t in (1, 0))
    assert (none["prediction"], every["prediction"]) == ([], ["class 0", "class 1"])


@pytest.mark.parametrize(
    ("limits", "request_", "status", "told"),
    [
        ({"request_bytes": 1000}, {"content": USABLE}, 413, "the request has more than 1,000 bytes"),
        ({"request_bytes": 1000}, {"content": iter([USABLE])}, 413, "the request has more than 1,000 bytes"),
        ({"image_bytes": 1000}, {"content": USABLE}, 413, "an image has more than 1,000 bytes"),
        ({"image_bytes": 1000}, {"files": [("images", USABLE)]}, 413, "an image has more than 1,000 bytes"),
        ({"images": 1}, {"files": [("images", USABLE)] * 2}, 400, "Too many files"),
        ({"max_pixels": 3071}, {"content": USABLE}, 422, "the image cannot be used: too large: 3,072 pixels, more"),
        ({}, {"content": pictures()["bomb.png"]}, 422, "the image cannot be used: too large: decompression bomb"),
        ({}, {"content": pictures()["bomb.gif"]}, 422, "the image cannot be used: too large: "),
        ({"held_bytes": 1000}, {"content": USABLE}, 429, "too much is under way"),
        ({"answer_s": 0.0001}, {"content": USABLE}, 504, "no answer within 0.0001 s"),
        ({}, {"content": b""}, 422, "the body is empty"),
        ({}, {"content": pickle.dumps({"a": 1})}, 422, "the image cannot be used: not an image"),
        ({}, {"files": [("images", pickle.dumps([1])), ("others", USABLE)]}, 422, "the image cannot be used: not an"),
        ({}, {"files": [("others", USABLE)]}, 422, "the form's field images holds no files"),
        ({}, {"data": {"images": "text"}, "files": [("others", b"")]}, 422, "the form's field images holds no files"),
        ({}, {"content": b"--", "headers": {"content-type": "multipart/form-data"}}, 400, "Missing boundary"),
        ({}, {"json": {"url": "http://127.0.0.1/"}}, 415, "URLs are not fetched here"),
    ],
)  # fmt: skip
def test_what_is_beyond_a_limit_gets_its_status_and_a_sentence(
    limits: dict[str, Any], request_: dict[str, Any], status: int, told: str, folder: Path
) -> None:
    answer = post(bundle_of(folder), Limits(**limits), **request_)
    assert (answer.status_code, answer.json()["error"][: len(told)]) == (status, told)
    assert ("retry-after" in answer.headers) == (status in (429, 504))


def test_names_are_echoed_and_are_no_paths(folder: Path, client: TestClient, tmp_path: Path) -> None:
    names = ["../../etc/passwd", f"{tmp_path}/written.jpg", "a\\..\\b", "\x00.jpg", "n" * 300, "<script>"]
    answer = client.post("/predict", files=[("images", (name, USABLE)) for name in names]).json()
    assert [each["name"] for each in answer] == [*names[:3], answer[3]["name"], "n" * 255, "<script>"]
    assert list(tmp_path.iterdir()) == []


def test_only_who_has_the_token_is_answered(folder: Path) -> None:
    with answering(bundle_of(folder), token="secret") as (app, _):
        client = TestClient(app)
        for headers, status in (
            ({}, 401), ({"Authorization": "Bearer secre"}, 401), ({"Authorization": "secret"}, 401),
            ({"Authorization": b"Bearer \xff"}, 401), ({"Authorization": "Bearer secret"}, 200),
        ):  # fmt: skip
            assert client.post("/predict", content=USABLE, headers=headers).status_code == status
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200


def test_the_other_pages_need_no_network(client: TestClient) -> None:
    page = client.get("/")
    assert "'none'" in page.headers["content-security-policy"]
    assert not re.search(r"https?://|//cdn", page.text)
    told = client.get("/openapi.json").json()
    assert {"/predict", "/healthz", "/readyz", "/metrics"} <= told["paths"].keys()
    assert {"200", "401", "413", "422", "429", "504"} <= told["paths"]["/predict"]["post"]["responses"].keys()
    assert client.get("/docs").status_code == 404


def test_requests_at_the_same_time_share_batches_and_are_counted(folder: Path) -> None:
    limits = Limits(wait_ms=20_000, batch=16)  # so the first waits for the last
    with answering(bundle_of(folder), limits) as (app, _), ThreadPoolExecutor(16) as pool:
        client = TestClient(app)
        data = [pictures()[KINDS[i % 3]] for i in range(16)]
        answers = list(pool.map(lambda each: client.post("/predict", content=each), data))
        batches = re.search(r"^thawline_serve_batches_total.* (\S+)$", client.get("/metrics").text, re.M)
        broken = client.post("/predict", content=b"text")
        text = client.get("/metrics").text
    assert [answer.status_code for answer in [*answers, broken]] == [*[200] * 16, 422]
    for i, answer in enumerate(answers):
        assert answer.json()[0]["probabilities"] == pytest.approx(answers[i % 3].json()[0]["probabilities"], abs=1e-5)
    told = {
        name: float(value) for name, value in re.findall(r'^thawline_serve_(\w+){run="the run"} (\S+)$', text, re.M)
    }
    assert batches is not None
    assert batches[1] == "1.0"
    assert (told["images_total"], told["refused_images_total"], told["queue"]) == (16, 1, 0)
    assert all(told[f"{part}_seconds_total"] > 0 for part in ("queue", "decode", "model"))
    assert 'thawline_serve_requests_total{run="the run",status="200"} 16.0' in text
    assert 'thawline_serve_requests_total{run="the run",status="422"} 1.0' in text


def test_a_full_queue_refuses_and_nothing_of_it_is_lost(folder: Path) -> None:
    """8 requests at once where 2 images may be under way: each is answered, or told to come again."""
    with (
        answering(bundle_of(folder), Limits(queue=2, wait_ms=200)) as (app, _),
        ThreadPoolExecutor(8) as pool,
    ):
        client = TestClient(app)
        answers = list(pool.map(lambda _: client.post("/predict", content=USABLE), range(8)))
        again = client.post("/predict", content=USABLE)
        metrics = client.get("/metrics").text
    statuses = [answer.status_code for answer in answers]
    assert {*statuses} == {200, 429}
    assert again.status_code == 200
    assert {answer.headers.get("retry-after") for answer in answers} == {None, "1"}
    assert 'thawline_serve_queue{run="the run"} 0.0' in metrics


def test_limits_that_allow_nothing_get_a_sentence() -> None:
    for name in ("batch", "queue", "answer_s"):
        with pytest.raises(ServeError, match=rf"--{name.replace('_', '-')} 0 leaves nothing"):
            Limits(**{name: 0})
    with pytest.raises(ServeError, match="--wait-ms -1"):
        Limits(wait_ms=-1)
    for endless in (float("inf"), float("nan")):
        with pytest.raises(ServeError, match=rf"--answer-s {endless} is no limit; give a number of at most"):
            Limits(answer_s=endless)
    Limits(wait_ms=0)
