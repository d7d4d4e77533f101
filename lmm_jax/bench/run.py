"""What `lmm bench` runs; each part imports only what it needs, as a machine with an accelerator may lack the rest."""

import tempfile


def run(args) -> list:
    """Rows of `bench.Measurement` of the part `args.what`; `args` are those of `lmm bench`, see its help."""
    return _data(args) if args.what == "data" else _model(args)


def _data(args):
    from lmm_jax.bench import data as bench_data
    from lmm_jax.config import load_config

    config = load_config(args.config, *args.overrides)
    packs = args.packs or config.train.batch_size
    with tempfile.TemporaryDirectory() as folder:
        if args.photographs:
            bench_data.use_photographs(config, folder, args.photographs)
        return bench_data.bench_data(config, args.records, args.step_seconds, packs)


def _model(args):
    from lmm_jax.bench.measure import peer_device

    device = peer_device() if args.peer else None  # before JAX is asked for a device here
    if args.what == "decode":
        from lmm_jax.bench.decode import bench_decode

        return bench_decode(args.shape, args.dtype, steps=args.steps, device=device)
    if args.what == "attention":
        from lmm_jax.bench.attention import bench_attention

        return bench_attention(args.shape, args.dtype, args.steps, device)
    if args.what == "guards":
        from lmm_jax.bench.guards import bench_guards

        return bench_guards(args.shape, args.dtype, args.steps)
    if args.growth:
        from lmm_jax.bench.growth import bench_growth

        return bench_growth(args.shape, args.dtype, args.growth, args.steps, args.checkpoint)
    from lmm_jax.bench.train import bench_train

    states = dict.fromkeys([args.state] if args.state else [args.dtype, "float32"])
    return bench_train(args.shape, args.dtype, states, args.steps, args.checkpoint, device, args.compile_peer)
