"""The server of the page: Starlette on one address of this machine, for whoever has the token that was made when it began.

Every request must name a host that cannot be another site's (a rebound name would), and carry the token: in a cookie that is set when the
page is opened with it, or in the header ``Authorization: Bearer``. A request that another page of the same browser began is refused. The
page may load nothing but itself. Errors are JSON with a reason; what an unexpected exception says is not passed on, as it may quote a file.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Callable, Sequence
from http.cookies import CookieError, SimpleCookie
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from medvl.types import RESEARCH_USE, UnreadableImageError
from tasks.view.content import Kind, NoMapError, Viewer
from tasks.view.studies import Studies, TooLargeError

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

STATIC = {
    "app.js": "text/javascript",
    "panel.js": "text/javascript",
    "source.js": "text/javascript",
    "niivue.js": "text/javascript",
    "view.css": "text/css",
    "niivue.LICENSES.txt": "text/plain",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
LONGEST_PHRASE = 500
CLOSED = "this page needs the address that `medvl view` printed, token and all"


def import_server() -> None:
    """See that Starlette and uvicorn are there.

    Raises:
        ImportError: one is not installed.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError("the page needs Starlette and uvicorn, which are not installed: pip install 'medvl[view]'") from error


def static_file(name: str) -> bytes:
    """A file of the page."""
    return (resources.files("tasks.view") / "static" / name).read_bytes()


class Guard:
    """See the module; wraps everything the server does.

    Args:
        host: that the server was told to listen on.
        cookie: name of the cookie; it must differ between servers of one machine, as cookies do not tell ports apart.
    """

    def __init__(self, app: ASGIApp, token: str, host: str, cookie: str) -> None:
        self.app, self.token, self.host, self.cookie = app, token, host, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        from starlette.datastructures import Headers
        from starlette.responses import JSONResponse

        headers = Headers(scope=scope)
        in_address = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0] if scope["path"] == "/" else ""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = dict(HEADERS)
                if in_address:
                    more["set-cookie"] = f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict"
                message["headers"] = [*message["headers"], *((name.encode(), value.encode()) for name, value in more.items())]
            await send(message)

        refused = self._refused(headers, in_address)
        if refused is not None:
            in_address = ""
            await JSONResponse({"error": refused}, 403)(scope, receive, with_headers)
            return
        await self.app(scope, receive, with_headers)

    def _refused(self, headers: Any, in_address: str) -> str | None:
        """Why a request is refused; None: it is not."""
        given = headers.get("host", "")
        if not allowed_host(given, self.host):
            return "the request names another host than this server"
        if headers.get("origin", f"http://{given}") != f"http://{given}":
            return "the request was begun by another page"
        bearer = headers.get("authorization", "")
        tokens = (in_address, _cookie(headers.get("cookie", ""), self.cookie), bearer.removeprefix("Bearer "))
        if not any(secrets.compare_digest(one.encode("utf-8", "replace"), self.token.encode()) for one in tokens):
            return CLOSED
        return None


def allowed_host(given: str, host: str) -> bool:
    """Whether a Host header is this machine's for sure: an address, ``localhost``, or the name that the server listens on."""
    name = given.rpartition(":")[0] if given.rpartition(":")[2].isdigit() and not given.endswith("]") else given
    name = name.strip("[]").lower()
    if name in ("localhost", host.lower()):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    listens_here = host == "localhost" or _is_loopback(host)
    return address.is_loopback or not listens_here


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _cookie(header: str, name: str) -> str:
    try:
        morsel = SimpleCookie(header).get(name)
    except CookieError:
        return ""
    return "" if morsel is None else morsel.value


def make_app(
    viewer: Viewer, studies: Studies, *, token: str, host: str = "127.0.0.1", port: int = 0, phrases: Sequence[str] = ()
) -> ASGIApp:
    """The whole server as an ASGI application.

    Args:
        phrases: what the page looks for at first; the second stands beside the first.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def page(request: Request) -> Response:
        return Response(static_file("index.html"), media_type="text/html")

    def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in STATIC:
            raise HTTPException(404, "no such file of the page")
        return Response(static_file(name), media_type=STATIC[name])

    def state(request: Request) -> Response:
        return JSONResponse(
            {
                "notice": RESEARCH_USE,
                "models": [{"name": model.name, "findings": list(model.bank.findings)} for model in viewer.models],
                "studies": studies.to_list(),
                "phrases": list(phrases),
                "maxUpload": studies.max_upload,
            }
        )

    def study(request: Request) -> Response:
        number = request.path_params["number"]
        return JSONResponse({"name": studies[number].name, **_read(viewer, studies, number).to_dict()})

    def image(request: Request) -> Response:
        content = _read(viewer, studies, request.path_params["number"]).nifti
        return Response(content, media_type="application/octet-stream", headers={"content-encoding": "gzip"})

    def scores(request: Request) -> Response:
        number, model = request.path_params["number"], _model(request, viewer)
        return JSONResponse(_told(studies, number, lambda path: viewer.scores(path, model)))

    def similarity_map(request: Request) -> Response:
        number, model = request.path_params["number"], _model(request, viewer)
        kind, what = _asked(request, viewer, model)
        return JSONResponse(_told(studies, number, lambda path: viewer.map(path, model, kind, what)))

    async def begin_drop(request: Request) -> Response:
        return JSONResponse({"drop": studies.begin_drop()}, 201)

    async def take(request: Request) -> Response:
        drop = studies.drop(request.path_params["number"])
        if drop.size + int(request.headers.get("content-length", "0")) > drop.most:
            raise TooLargeError(f"more than {drop.most} bytes at once; raise --max-upload, or name the file on the command line")
        path = drop.new_file(request.query_params.get("name", ""))
        try:
            with path.open("xb") as file:
                async for part in request.stream():
                    drop.take(len(part))
                    file.write(part)
        except BaseException:  # too much, or the page has gone: half a file is none
            path.unlink(missing_ok=True)
            raise
        return JSONResponse({"bytes": path.stat().st_size})

    def end_drop(request: Request) -> Response:
        numbers = studies.end_drop(request.path_params["number"])
        return JSONResponse({"added": numbers, "studies": studies.to_list()})

    def failed(status: int) -> Callable[[Request, Exception], Response]:
        return lambda request, error: JSONResponse({"error": str(error.args[0]) if error.args else type(error).__name__}, status)

    def http_failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code)

    def unexpected(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": f"internal error ({type(error).__name__})"}, 500)

    number = "{number:int}"
    app: Starlette = Starlette(
        routes=[
            Route("/", page),
            Route("/{name:str}", static),
            Route("/api/state", state),
            Route(f"/api/studies/{number}", study),
            Route(f"/api/studies/{number}/image", image),
            Route(f"/api/studies/{number}/scores", scores),
            Route(f"/api/studies/{number}/map", similarity_map),
            Route("/api/drops", begin_drop, methods=["POST"]),
            Route(f"/api/drops/{number}", take, methods=["PUT"]),
            Route(f"/api/drops/{number}", end_drop, methods=["POST"]),
        ],
        exception_handlers={
            UnreadableImageError: failed(422),
            TooLargeError: failed(413),
            IndexError: failed(404),
            HTTPException: http_failed,
            Exception: unexpected,
        },
    )
    return Guard(app, token, host, f"medvl-view-{port}")


def _read(viewer: Viewer, studies: Studies, number: int) -> Any:
    return _told(studies, number, viewer.show)


def _told(studies: Studies, number: int, work: Callable[[Path], Any]) -> Any:
    """What ``work`` makes of a study; a broken one is marked in the list, and its reason speaks of the name that the page shows.

    Raises:
        HTTPException: with the reason.
        IndexError: no such study.
    """
    from starlette.exceptions import HTTPException

    one = studies[number]
    if one.checked and one.error is not None:
        raise HTTPException(422, one.error)
    try:
        return work(one.path)
    except UnreadableImageError as error:
        raise HTTPException(422, str(error).replace(str(one.path), one.name)) from None
    except NoMapError as error:
        raise HTTPException(422, str(error)) from None
    except Exception as error:
        raise HTTPException(500, f"{one.name}: cannot be shown ({type(error).__name__})") from None


def _model(request: Request, viewer: Viewer) -> int:
    from starlette.exceptions import HTTPException

    given = request.query_params.get("model", "0")
    if not given.isdecimal() or int(given) >= len(viewer.models):
        raise HTTPException(400, f"model is {given!r:.40}, expected 0 to {len(viewer.models) - 1}")
    return int(given)


def _asked(request: Request, viewer: Viewer, model: int) -> tuple[Kind, str]:
    from starlette.exceptions import HTTPException

    finding, phrase = request.query_params.get("finding"), " ".join(request.query_params.get("phrase", "").split())
    if finding is not None:
        if finding not in viewer.models[model].bank.findings:
            raise HTTPException(400, "no prompts for this finding")
        return "finding", finding
    if not 1 <= len(phrase) <= LONGEST_PHRASE:
        raise HTTPException(400, f"the phrase has {len(phrase)} characters, expected 1 to {LONGEST_PHRASE}")
    return "phrase", phrase


def serve(app: ASGIApp, host: str, sockets: Sequence[Any]) -> None:
    """Serve until interrupted or told to end, which are both a KeyboardInterrupt here; nothing of a request is logged."""
    import signal

    import uvicorn

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = uvicorn.Config(app, log_level="critical", access_log=False, lifespan="off", server_header=False, timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=list(sockets))
