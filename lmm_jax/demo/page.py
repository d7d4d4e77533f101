"""The page of `lmm demo` in Gradio: its components, its server, and what neither of them may do.

What it shows is made by the other files of this folder, which need no Gradio.
"""

import html
import os
import pathlib
import signal
import socket
import tempfile
import threading

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read where gradio is imported

import gradio as gr
from starlette.middleware import Middleware

from lmm_jax.demo.answers import MOST_NEW_TOKENS
from lmm_jax.demo.examples import find_examples
from lmm_jax.demo.handlers import Handlers, stopped
from lmm_jax.generation.model import AUTO

TOGETHER = 16  # visitors that are answered at the same time; others wait in a queue
KEPT = 3600  # seconds after which an upload is deleted
COMPARED = 4  # scales that are ticked at first
LOOPBACK = ("127.0.0.1", "localhost")
# By which the browser fetches nothing from elsewhere, whatever a release of gradio has in its page.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'; form-action 'self'"


def serve(model, name, host="127.0.0.1", port=None, max_upload=20):
    """Shows the page until Ctrl-C; called in the main thread.

    Args:
      model: that `lmm.load` returned.
      name: of its folder, for the head of the page.
      host: address to listen at; others than this machine's own loopback let everybody in who can reach it.
      port: to listen at; None takes 7860, or the next that is free.
      max_upload: megabytes (2²⁰ bytes) that a picture may have.

    Raises:
      OSError: nothing can listen at this address.
    """
    check_address(host, port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a server is ended by `kill`, too
    with tempfile.TemporaryDirectory(prefix="lmm_demo_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads lie where no other user reads, and go when the page goes
        examples = find_examples(model.program.config.data, folder)
        page = build(Handlers(model), name, max_upload, examples)
        address = _launch(page, host, port, max_upload)
        print(f"{name} can be asked at {address} (Ctrl-C ends it)", flush=True)
        if host not in LOOPBACK:
            print(f"everybody who reaches {host} can ask it, and upload pictures of {max_upload} MB", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("\nthe page is closed", flush=True)
        finally:
            page.close(verbose=False)


def check_address(host, port):
    """Raises OSError with a sentence if nothing can listen at an address; port None stands for any."""
    try:
        if port is not None and port > 65_535:  # of which the next line would take what is left of 16 bits
            raise OverflowError("there is no such port")
        family, kind, _, _, address = socket.getaddrinfo(
            host,
            port or 0,
            socket.AF_INET,  # gradio takes no other
            socket.SOCK_STREAM,
        )[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except (OSError, OverflowError) as error:
        where = host if port is None else f"{host}, port {port}"
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"the page cannot be shown at {where}: {reason}; --host takes an IPv4 address of this machine, --port a "
            "free port from 1 to 65535"
        ) from error


def _launch(page, host, port, max_upload):
    """Starts the server, in a thread of its own, and returns its address."""
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            enable_monitoring=False,
            mcp_server=False,
            max_file_size=f"{max_upload}mb",
            footer_links=[],
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css_paths=pathlib.Path(__file__).with_name("page.css"),
            app_kwargs={"middleware": [Middleware(_OwnOrigin)]},
        )
    except OSError as error:  # such as that all ports from 7860 on are taken
        raise OSError(f"gradio cannot show the page at {host}: {error}; try another --host or --port") from error
    return address


def build(handlers, name, max_upload, examples=()) -> gr.Blocks:
    """The page; see `serve`."""
    largest = max(handlers.model.scales)
    with gr.Blocks(title=f"lmm demo: {name}", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gr.HTML(
            f"<h1>{html.escape(str(name))}</h1><p>Ask about a picture, at several numbers of visual tokens side by "
            "side. Nothing leaves the machine that this page comes from.</p>",
            padding=False,
            elem_id="head",
        )
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                picture = gr.File(label=f"Picture, up to {max_upload} MB", height=140, elem_id="picture")
                question = gr.Textbox(label="Question", lines=1, max_lines=6, elem_id="question")
                place, ticks = _budget(handlers, largest)
                compared = gr.CheckboxGroup(
                    handlers.compared,
                    value=[
                        *sorted(handlers.model.scales)[-COMPARED:],
                        *(s for _, s in handlers.compared if s == AUTO),
                    ],
                    label="Answer side by side at",
                    visible=len(handlers.scales) > 1,
                    elem_id="compared",
                )
                with gr.Accordion("Options", open=False):
                    tokens = gr.Number(
                        0, label="Most new tokens", info=f"0: {MOST_NEW_TOKENS}", minimum=0, precision=0
                    )
                    temperature = gr.Slider(
                        0, 2, 0, step=0.1, label="Temperature", info="0: always the likeliest token"
                    )
                    seed = gr.Number(0, label="Seed", info="of a temperature above 0", precision=0)
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", min_width=80, elem_id="ask")
                    stop = gr.Button("Stop", min_width=80, elem_id="stop")
                if examples:
                    gr.Examples(
                        [[example.picture, example.question] for example in examples],
                        [picture, question],
                        label="Examples, from the data that it was trained on",
                        example_labels=[example.question for example in examples],
                        cache_examples=False,
                    )
            with gr.Column(scale=8, min_width=420, elem_id="right"):
                gr.HTML('<h2 class="part">Answers</h2>', padding=False)
                answers = gr.HTML(
                    '<p class="note">They come here, one column a budget.</p>', padding=False, elem_id="answers"
                )
                gr.HTML(
                    '<p class="note">Seconds are of each answer alone: the budgets are asked one after the other. '
                    "The first question of a kind also waits for its program to be compiled, and the first about a "
                    "picture for the picture's features.</p>",
                    padding=False,
                )
                gr.HTML('<h2 class="part">What each visual token stands for</h2>', padding=False)
                drawings = gr.HTML(handlers.show(None, 0), padding=False, elem_id="drawings")
                gr.HTML('<h2 class="part">Which stack is added where</h2>', padding=False)
                gr.HTML(handlers.map(), padding=False, elem_id="map")
        quick = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
        picture.change(handlers.show, [picture, place], drawings, **quick)
        if ticks is not None:
            place.change(handlers.ticks, place, ticks, trigger_mode="always_last", **quick)
            place.change(handlers.show, [picture, place], drawings, trigger_mode="always_last", **quick)
        asked = gr.on(
            [ask.click, question.submit],
            handlers.ask,
            [picture, question, place, compared, tokens, temperature, seed],
            answers,
            concurrency_limit=TOGETHER,
            show_progress="hidden",
            api_visibility="private",
        )
        stop.click(None, cancels=[asked]).then(stopped, answers, answers, **quick)  # after the last piece
    return page


def _budget(handlers, largest):
    """The slider over the scales with its ticks; of a single scale its place alone, and None."""
    place = handlers.scales.index(largest)
    last = len(handlers.scales) - 1
    if not last:
        return gr.State(place), None
    with gr.Group():
        slider = gr.Slider(0, last, place, step=1, label="Scale: visual tokens of a square view", elem_id="budget")
        ticks = gr.HTML(handlers.ticks(place), padding=False, elem_id="ticks")
    return slider, ticks


class _OwnOrigin:
    """Middleware that adds `POLICY` to what the server answers."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"content-security-policy", POLICY.encode())]}
            await send(message)

        await self.app(scope, receive, send_with_policy if scope["type"] == "http" else send)
