"""The command line: thin. A command imports what it uses when it runs, so that a prompt does not wait for a bench."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .errors import ConfigError, HeadraceError, RequestError
from .processes import prepare_to_load
from .serve.command import serve
from .serve.scale import scale

MAX_PROMPT_BYTES = 64 << 20  # of standard input


class _Group(TyperGroup):
    """Every HeadraceError is one line on stderr and exit code 1; HEADRACE_DEBUG=1 shows where it came from."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except HeadraceError as error:
            if os.environ.get("HEADRACE_DEBUG") == "1":
                raise
            typer.echo(f"headrace: {_one_line(error)}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo(err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # Whoever read the output has gone: leave quietly, and give the interpreter's last flush somewhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run, measure and look into language models.",
)
eval_app = typer.Typer(no_args_is_help=True, help="Measure a model's quality.")
bench_app = typer.Typer(invoke_without_command=True)
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")
app.command()(serve)
app.command()(scale)

Model = Annotated[
    str, typer.Option("--model", "-m", help="Alias, .gguf file, Hugging Face folder or hf:org/name[:file].")
]
Kernels = Annotated[str, typer.Option(help="Op set: auto, native or reference.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of the op set [default: one a core].", show_default=False)
]
Activations = Annotated[
    str, typer.Option(help="int8 scales of activations: one a group, or (faster, coarser) one a row.")
]
KVDtype = Annotated[str, typer.Option(help="Keys and values as float32, float16, bfloat16 or int8.")]
Plan = Annotated[
    str | None,
    typer.Option(
        help="Split the model over processes: a plan, as in '0-14 x2 | 15-29', or its file.", show_default=False
    ),
]
Listen = Annotated[
    str | None,
    typer.Option(help="HOST:PORT at which workers of a plan's hosts (@NAME) join.", show_default=False),
]
SecretFile = Annotated[
    str | None,
    typer.Option(help="With --listen: file of the secret that those workers know.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
DEFAULT_MODEL = "smollm2-135m"


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"headrace {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; read from standard input if absent or '-'.")] = None,
    model: Model = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    as_json: Json = False,
    kernels: Kernels = "auto",
    threads: Threads = None,
    activations: Activations = "group",
    kv_dtype: KVDtype = "auto",
    plan: Plan = None,
    listen: Listen = None,
    secret_file: SecretFile = None,
) -> None:
    """Answer one prompt, as it is generated."""
    from .chat_cli import printable
    from .llm import LLM
    from .types import SamplingParams

    if raw and system is not None:
        raise ConfigError("--system needs the chat template, which --raw skips; leave one of them out")
    text = _read_prompt(prompt)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    messages: list[dict[str, Any]] = [
        *([{"role": "system", "content": system}] if system is not None else []),
        {"role": "user", "content": text},
    ]
    settings = {"kernels": kernels, "threads": threads, "activations": activations, "kv_dtype": kv_dtype}
    with LLM(model, **settings, plan=plan, listen=listen, secret_file=secret_file) as llm:
        if as_json:
            print(
                json.dumps(
                    _answer(llm.generate([text], params)[0] if raw else llm.chat(messages, params)), ensure_ascii=False
                )
            )
            return
        shown = printable if sys.stdout.isatty() else str
        for piece in llm.stream(text, params) if raw else llm.stream_chat(messages, params):
            sys.stdout.write(shown(piece.text))
            sys.stdout.flush()
        print()


@app.command()
def chat(
    model: Model = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.2,
    seed: Annotated[int | None, typer.Option(help="Seed of every answer.")] = None,
    kernels: Kernels = "auto",
    threads: Threads = None,
    activations: Activations = "group",
    kv_dtype: KVDtype = "auto",
    plan: Plan = None,
) -> None:
    """Talk with a model. /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves."""
    from .chat_cli import Chat
    from .llm import LLM
    from .types import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with LLM(model, kernels=kernels, threads=threads, activations=activations, kv_dtype=kv_dtype, plan=plan) as llm:
        Chat(llm, params, system).loop()


@app.command()
def embed(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; standard input's lines if there are none.")] = None,
    model: Model = "minilm",
    normalize: Annotated[bool, typer.Option(help="Bring each embedding to length 1.")] = True,
    kernels: Kernels = "auto",
    threads: Threads = None,
) -> None:
    """Embed texts with an encoder: a JSON list of numbers for each, one a line."""
    from .llm import LLM

    many = texts or _read_prompt(None).splitlines()
    with LLM(model, kernels=kernels, threads=threads) as llm:
        for vector in llm.embed(many, normalize):
            print(json.dumps([float(f"{value:.7g}") for value in vector]))


@app.command()
def pull(model: Annotated[str, typer.Argument(help="Alias or hf:org/name[:file].")] = DEFAULT_MODEL) -> None:
    """Fetch a model into the cache and print where it lies."""
    from .formats.hub import pull as fetch

    typer.echo(fetch(model))


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help="Also describe this model.")] = None,
    as_json: Json = False,
    kernels: Kernels = "auto",
) -> None:
    """Show the machine, the op set chosen and why, and what a model costs here."""
    from .lab.info import describe, print_facts

    facts = describe(model, kernels)
    if as_json:
        print(json.dumps(facts))
    else:
        print_facts(facts)


@app.command()
def plan(
    plan: Annotated[str, typer.Argument(help="A plan, as in '0-14 x2 | 15-29' or '2', or its file.")] = "2",
    model: Model = DEFAULT_MODEL,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run it, and move its cuts to where they are best.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, max=10, help="With --measure: how often to measure and cut.")] = 2,
    output: Annotated[Path | None, typer.Option(help="Write it as YAML or JSON.", show_default=False)] = None,
) -> None:
    """Show a plan with nothing left open: cuts, threads, cores, micro-batches."""
    from .assemble import open_model
    from .assemble_split import resolve_plan
    from .plan.plan import Plan as ModelPlan

    if measure:
        from .lab.tune import print_tuned, tune_plan

        with _progress("rounds") as advance:
            tuned = tune_plan(model, plan, rounds, advance)
        print_tuned(tuned)
        found = tuned.after
    else:
        from rich.console import Console

        from .plan.partition import mixed_costs

        opened = open_model(model)
        found = resolve_plan(ModelPlan.parse(plan, opened.spec), opened)
        Console(highlight=False).print(found.describe(mixed_costs(opened.spec, opened.file)))
    if output is not None:
        found.write(output)


@eval_app.command()
def perplexity(
    text: Annotated[Path, typer.Option(help="A UTF-8 text file.")],
    model: Model = DEFAULT_MODEL,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    stride: Annotated[int, typer.Option(help="Tokens from one window's start to the next's.")] = 512,
    limit_bytes: Annotated[
        int | None, typer.Option(min=1, help="Read only this much of the file.", show_default=False)
    ] = None,
    as_json: Json = False,
    kernels: Kernels = "auto",
    threads: Threads = None,
    activations: Activations = "group",
    kv_dtype: KVDtype = "auto",
) -> None:
    """Perplexity of a text, window by window.

    A window is scored on the tokens that no earlier window scored and that have a token before them in it.
    """
    from .lab.perplexity import measure, read_text
    from .llm import LLM

    document = read_text(text, limit_bytes)
    with (
        LLM(
            model, kernels=kernels, threads=threads, activations=activations, kv_dtype=kv_dtype, max_context=context
        ) as llm,
        _progress("windows", quiet=as_json) as advance,
    ):
        result = measure(llm, document, context, stride, advance)
    if as_json:
        print(json.dumps(result.as_dict()))
    else:
        typer.echo(result)


@bench_app.callback()
def bench(
    ctx: typer.Context,
    model: Model = DEFAULT_MODEL,
    tests: Annotated[str, typer.Option(help="Names, comma-separated.")] = "pp128,pp512,tg128,tg128@512,b8,b32,b64",
    reps: Annotated[int, typer.Option(min=1, max=1000, help="Measured runs of each test, after one to warm up.")] = 3,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results here.", show_default=False)
    ] = None,
    kernels: Kernels = "auto",
    threads: Threads = None,
    activations: Activations = "group",
    kv_dtype: KVDtype = "auto",
    plan: Annotated[
        list[str] | None,
        typer.Option(help="Also by this plan (see run), in turn with one process.", show_default=False),
    ] = None,
    listen: Listen = None,
    secret_file: SecretFile = None,
    against: Annotated[
        str, typer.Option(help="Other engines, run in turn with ours: llama.cpp,openvino,transformers,vllm.")
    ] = "",
    peers: Annotated[
        str | None,
        typer.Option(help="Folder of their environments, FOLDER/<peer>/bin/python.", envvar="HEADRACE_PEERS"),
    ] = None,
    peer_model: Annotated[
        list[str] | None, typer.Option(help="PEER=PATH: a model for one of them [default: the same file].")
    ] = None,
    channels: Annotated[
        bool, typer.Option("--channels", help="Instead: what a hop between two processes costs, by each transport.")
    ] = False,
    sizes: Annotated[
        str, typer.Option(help="With --channels: bytes of a message, comma-separated.")
    ] = "1k,4k,16k,64k,256k,1M,4M,16M",
) -> None:
    """Measure tokens per second, beside what the machine's memory and arithmetic allow at that moment.

    ppN[xB]: N prompt tokens (of each of B prompts) to the first output token. tgN[@D]: N tokens generated alone after a
    prompt of 8 (or D) tokens.
    bB: B sequences of 64 prompt tokens together, 64 tokens generated each. Prefill is left out of tg and b.
    """
    if ctx.invoked_subcommand is not None:
        return
    if channels:
        _bench_channels(sizes, reps, json_file)
        return
    from .assemble import open_model, thread_count
    from .lab.against import peer_models, peers_folder, started
    from .lab.bench import measure, parse_tests, print_report, write_report

    parsed = parse_tests(tests)
    if plan:
        arithmetic = {"kernels": kernels, "threads": threads, "activations": activations, "kv_dtype": kv_dtype}
        joining = {"listen": listen, "secret_file": secret_file}
        _bench_plans(model, plan, parsed, reps, json_file, arithmetic | joining)
        return
    names = [name.strip() for name in against.split(",") if name.strip()]
    models = peer_models(names, peer_model or [], open_model(model).path)
    with started(names, peers_folder(peers), models, thread_count(threads)) as others, _progress("runs") as advance:
        report = measure(
            model,
            parsed,
            reps,
            advance,
            others,
            kernels=kernels,
            threads=threads,
            activations=activations,
            kv_dtype=kv_dtype,
        )
    print_report(report)
    if json_file is not None:
        write_report(report, json_file)


def _bench_plans(
    model: str, plans: list[str], tests: list[Any], reps: int, json_file: Path | None, settings: dict[str, Any]
) -> None:
    from .lab.plans import measure_plans, print_plans, write_plans

    with _progress("runs") as advance:
        report = measure_plans(model, plans, tests, reps, advance, **settings)
    print_plans(report)
    if json_file is not None:
        write_plans(report, json_file)


def _bench_channels(sizes: str, reps: int, json_file: Path | None) -> None:
    from .lab.channels import measure_channels, parse_sizes, print_channels, write_channels

    parsed = parse_sizes(sizes)
    with _progress("sizes") as advance:
        report = measure_channels(parsed, reps, advance)
    print_channels(report)
    if json_file is not None:
        write_channels(report, json_file)


@bench_app.command()
def overhead(
    steps: Annotated[int, typer.Option(min=10, max=100_000, help="Steps to measure.")] = 500,
    as_json: Json = False,
) -> None:
    """Time of the engine's and the scheduler's own work in a step, with a device that answers at once."""
    from .lab.overhead import measure_overhead, print_overhead

    rows = measure_overhead(steps)
    if as_json:
        print(json.dumps(rows))
    else:
        print_overhead(rows)


@bench_app.command("embed")
def bench_embed(
    model: Model = "minilm",
    texts: Annotated[int, typer.Option(min=1, max=100_000, help="Texts, of 3 to 60 words.")] = 256,
    reps: Annotated[int, typer.Option(min=1, max=1000, help="Runs; the median is shown.")] = 5,
    as_json: Json = False,
    kernels: Kernels = "auto",
    threads: Threads = None,
    against: Annotated[
        str, typer.Option(help="Other engines, run in turn with ours: sentence-transformers,openvino.")
    ] = "",
    peers: Annotated[
        str | None,
        typer.Option(help="Folder of their environments, FOLDER/<peer>/bin/python.", envvar="HEADRACE_PEERS"),
    ] = None,
) -> None:
    """Measure how fast texts of mixed lengths are embedded.

    Other engines' embeddings are compared with ours: one that is further than 1e-3 in cosine distance is refused.
    """
    from .assemble import thread_count
    from .formats.hub import resolve
    from .lab.against import EMBEDDERS, peer_models, peers_folder, started
    from .lab.embedding import measure_embedding, print_embedding

    names = [name.strip() for name in against.split(",") if name.strip()]
    models = peer_models(names, [], resolve(model))
    with (
        started(names, peers_folder(peers), models, thread_count(threads), EMBEDDERS) as others,
        _progress("runs", quiet=as_json) as advance,
    ):
        report = measure_embedding(model, texts, reps, advance, others, kernels=kernels, threads=threads)
    if as_json:
        print(json.dumps(report))
    else:
        print_embedding(report)


@bench_app.command()
def bursts(
    plan: Annotated[str, typer.Option(help="A plan of several stages, as in '0-16 | 17-29', or its file.")] = "2",
    model: Model = DEFAULT_MODEL,
    sizes: Annotated[str, typer.Option(help="Micro-batches of a burst, comma-separated.")] = "1,2,4,8",
    reps: Annotated[int, typer.Option(min=1, max=100, help="Bursts of each size; the median is shown.")] = 5,
    timeline: Annotated[
        Path | None, typer.Option(help="Write a trace for Perfetto or chrome://tracing here.", show_default=False)
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results here.", show_default=False)
    ] = None,
    kernels: Kernels = "auto",
) -> None:
    """Bubbles of a plan: bursts of equal micro-batches, empty to empty, beside what must be idle."""
    from .lab.bursts import measure_bursts, print_bursts, write_bursts

    with _progress("bursts") as advance:
        config, found = measure_bursts(
            model, plan, _whole_numbers("--sizes", sizes), reps, advance, timeline, kernels=kernels
        )
    print_bursts(config, found)
    if json_file is not None:
        write_bursts(config, found, json_file)


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        return [int(one) for one in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r:.80} must be whole numbers, as in 1,8,32") from None


@bench_app.command()
def ops(
    model: Model = DEFAULT_MODEL,
    rows: Annotated[str, typer.Option(help="Sequences in a step, comma-separated.")] = "1,8,32",
    context: Annotated[int, typer.Option(help="Tokens before the step.")] = 64,
    reps: Annotated[int, typer.Option(min=1, max=1000, help="Steps; the median is shown.")] = 9,
    as_json: Json = False,
    threads: Threads = None,
    activations: Activations = "group",
    kv_dtype: KVDtype = "auto",
) -> None:
    """Where a decode step's time goes, by instruction, beside the machine's ceilings of that moment."""
    from .lab.op_times import measure_ops, print_ops

    with _progress("sizes", quiet=as_json) as advance:
        facts, profiles = measure_ops(
            model,
            _whole_numbers("--rows", rows),
            context,
            reps,
            advance,
            threads=threads,
            activations=activations,
            kv_dtype=kv_dtype,
        )
    if as_json:
        print(json.dumps({"config": facts, "runs": [profile.as_dict() for profile in profiles]}))
    else:
        print_ops(facts, profiles)


@app.command()
def load(
    url: Annotated[str, typer.Argument(help="The server, as in http://127.0.0.1:8000.")],
    rate: Annotated[
        float | None, typer.Option(help="Requests a second, as a Poisson process.", show_default=False)
    ] = None,
    burst: Annotated[int, typer.Option(help="With --rate: requests that come together.")] = 1,
    concurrency: Annotated[
        int | None,
        typer.Option(help="Requests kept open; beside --rate or --trace, the most of them.", show_default=False),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(help="Replay a trace: .csv (time, prompt and generated tokens) or .jsonl.", show_default=False),
    ] = None,
    speed: Annotated[float, typer.Option(help="With --trace: so many times as fast.")] = 1.0,
    requests: Annotated[
        int | None, typer.Option(help="How many; 100 if not given, or the trace's.", show_default=False)
    ] = None,
    duration: Annotated[
        float | None, typer.Option(help="Seconds in which requests are sent.", show_default=False)
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Of each, 64 if not given; of a trace's at most.", show_default=False)
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="To generate for each, 64 if not given; of a trace's at most.", show_default=False),
    ] = None,
    slo_ttft: Annotated[
        float | None, typer.Option(help="Seconds in which the first token must come.", show_default=False)
    ] = None,
    slo_itl: Annotated[
        float | None, typer.Option(help="Seconds that may pass between two tokens.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="By the server's name; its default if not given.", show_default=False),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File whose first line is the key to use.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and prompts.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 300.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results here.", show_default=False)
    ] = None,
) -> None:
    """Send requests to a server with OpenAI's API, and measure what they meet.

    Times are counted from when a request was sent and from when it was scheduled. Goodput: requests per second whose
    first token (from scheduled) and every gap between tokens kept within --slo-ttft and --slo-itl.
    """
    from .lab.load import LoadOptions, run_load
    from .lab.load_report import live, print_load, write_load
    from .serve.keys import read_key

    options = LoadOptions(
        url=url,
        rate=rate,
        burst=burst,
        concurrency=concurrency,
        trace=trace,
        speed=speed,
        requests=requests,
        duration=duration,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        slo_ttft=slo_ttft,
        slo_itl=slo_itl,
        model=model,
        seed=seed,
        timeout=timeout,
    )
    with live() as look:
        done = run_load(options, read_key(api_key_file), look)
    print_load(done)
    if json_file is not None:
        write_load(done, json_file)


@app.command()
def chaos(
    model: Annotated[str, typer.Argument(help="The model.")] = DEFAULT_MODEL,
    plan: Annotated[str, typer.Option(help="How it is split, as a notation or a file.")] = "0-14 x2 | 15-29",
    requests: Annotated[int, typer.Option(help="Requests of a round, of at most 128 + 64 tokens.")] = 200,
    concurrency: Annotated[int, typer.Option(help="Requests that run at once.")] = 16,
    every: Annotated[float, typer.Option(help="Seconds between two blows.")] = 2.0,
    blows: Annotated[int, typer.Option(help="Go on with the requests until there were so many.")] = 6,
    seed: Annotated[int, typer.Option(help="Of requests, and of whom it hits.")] = 0,
    schedule: Annotated[
        Path | None,
        typer.Option(help="Blows from a file: lines of time, stage, replica, rank, signal.", show_default=False),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results here.", show_default=False)
    ] = None,
    timeline: Annotated[Path | None, typer.Option(help="Write a trace for Perfetto here.", show_default=False)] = None,
    kernels: Kernels = "auto",
) -> None:
    """Kill and stop workers while they answer, and check that every request gives the tokens of a quiet run.

    Exit code 1 where one is lost, differs, or something is left over: pages, processes, descriptors, shared memory.
    """
    from .lab.chaos import ChaosOptions, print_chaos, read_schedule, run_chaos, write_chaos

    given = read_schedule(schedule) if schedule is not None else ()
    options = ChaosOptions(plan, requests, concurrency, every, blows, seed, given)
    with _progress("requests") as advance:
        report = run_chaos(model, options, advance, timeline, kernels=kernels)
    print_chaos(report)
    if json_file is not None:
        write_chaos(report, json_file)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def worker(
    join: Annotated[str, typer.Option(help="HOST:PORT at which the coordinator listens (its --listen).")],
    secret_file: Annotated[
        Path, typer.Option(help="File of the secret that both sides know: 16 bytes or more, mode 600.")
    ],
    name: Annotated[
        str | None,
        typer.Option(help="This host's name in the plan (@NAME); if not given, the system's.", show_default=False),
    ] = None,
    workers: Annotated[int, typer.Option(help="How many: each is one rank of the plan, or waits for one.")] = 1,
    model_dir: Annotated[
        Path | None,
        typer.Option(help="Look here first for a model that the coordinator names by its path.", show_default=False),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Leave when the coordinator is gone.")] = False,
) -> None:
    """Lend this host to a coordinator: run, bench or serve with a plan that names it (--plan "0-14 | 15-29 @NAME").

    It joins as soon as the coordinator is there, and again whenever the
    connection or a process is lost, until it is ended (Ctrl-C or SIGTERM). The
    model must be here too, by the same alias or path; a missing alias is pulled.

    Nothing on the wire is encrypted, and the coordinator may have any model
    read that you can read: use a network that you trust, or a tunnel.
    """
    from .join_command import stay

    folder = None if model_dir is None else str(model_dir.expanduser())
    raise typer.Exit(stay(join, str(secret_file), name, workers, folder, once))


@contextmanager
def _progress(unit: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, moved by (done, all); nothing where there is no terminal to see it."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    columns = [*Progress.get_default_columns(), MofNCompleteColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(unit)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _read_prompt(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise RequestError('no prompt: give one, as in headrace run "Why is the sky blue?", or pipe it in')
    data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise RequestError(f"standard input is longer than {MAX_PROMPT_BYTES} bytes; give a shorter prompt")
    text = data.decode("utf-8", errors="replace").removesuffix("\n")
    if not text:
        raise RequestError("the prompt on standard input is empty; give at least one character")
    return text


def _answer(output: Any) -> dict[str, Any]:
    """What `run --json` prints. Times are in seconds."""
    import msgspec

    timings = msgspec.to_builtins(output.timings)
    usage = {
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(output.token_ids),
        "total_tokens": len(output.prompt_token_ids) + len(output.token_ids),
    }
    return {
        "text": output.text,
        "token_ids": list(output.token_ids),
        "prompt_token_ids": list(output.prompt_token_ids),
        "finish_reason": output.finish_reason,
        "usage": usage,
        "timings": timings,
    }


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _warn(message: Warning | str, *_: Any) -> None:
    typer.echo(f"headrace: warning: {_one_line(message)}", err=True)


def main() -> None:
    warnings.showwarning = _warn
    # Before numpy comes: threads of its BLAS take time to start, and would spin on the cores that load the model.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    prepare_to_load()
    app()
