"""The modes of PyTorch that fastseq's modules are held to, what each cannot do and why; docs/modes.md shows them."""

import torch

from tests.modes.cases import BACKENDS, Limit, Mode

DTYPE = "these kernels take float32 and bfloat16"
TRACE = "`torch.jit.trace` sees PyTorch's operators alone, so it cannot record these kernels"
UNROLLED = "the steps are unrolled while the graph is recorded: one graph has one T. Rows may vary"
LAYERS = ("LSTM", "GRU", "RNN")
NO_GRAD_COMPILED = Limit(
    "PyTorch cannot differentiate its oneDNN LSTM in compiled code; without gradients it compiles",
    ("torch",), torch._dynamo.exc.Unsupported, "cannot differentiate torch's oneDNN LSTM", ("LSTM",),
)  # fmt: skip
NO_FORWARD = Limit(
    "PyTorch's oneDNN LSTM has no forward-mode gradients", ("torch",), NotImplementedError, "mkldnn_rnn_layer",
    ("LSTM",),
)  # fmt: skip
FP = Limit(f"the fused CPU kernels refuse the dtype: {DTYPE}", ("cpu",), match=DTYPE)

# Numbers
AUTOCAST = Mode("`torch.autocast`, bf16")
SCALER = Mode("`torch.amp.GradScaler` on the CPU")
BF16 = Mode("`module.bfloat16()`")
HALF = Mode("`module.half()`", (FP,))
DOUBLE = Mode("`module.double()`", (FP,))
DETERMINISTIC = Mode("`torch.use_deterministic_algorithms(True)`")

# Compilers and exporters
COMPILE = Mode("`torch.compile(fullgraph=True)`", (NO_GRAD_COMPILED,))
COMPILE_ROWS = Mode("… any B without recompiling", (NO_GRAD_COMPILED,))
COMPILE_STEPS = Mode(
    "… any T without recompiling",
    (NO_GRAD_COMPILED, Limit(UNROLLED, ("torch", "reference"), None, kinds=LAYERS)),
)
EXPORT = Mode("`torch.export`, dynamic B")
EXPORT_STEPS = Mode(
    "… dynamic B and T, strict or not",
    (Limit(UNROLLED, ("torch", "reference"), torch._dynamo.exc.UserError, "specialized it to be a constant", LAYERS),),
)
ONNX = Mode("`torch.onnx.export`, dynamic B and T")
ONNX_TRACED = Mode("`torch.onnx.export(dynamo=False)`, dynamic B and T")
SCRIPT = Mode("`torch.jit.script`")
TRACE_ROWS = Mode("`torch.jit.trace`, any B", (Limit(TRACE, ("cpu",), match="torch.jit.trace cannot record"),))
TRACE_STEPS = Mode(
    "… any T",
    (
        Limit(TRACE, ("cpu",), match="torch.jit.trace cannot record"),
        Limit(UNROLLED, ("reference",), RuntimeError, "TorchScript interpreter", LAYERS),
    ),
)
QUANTIZE = Mode(
    "`quantize_dynamic`, after `accelerate(undo='all')`",
    (Limit("PyTorch has no quantized RNN and leaves torch.nn.RNN as it is", BACKENDS, None, kinds=("RNN",)),),
)

# Gradients
DOUBLE_BACKWARD = Mode("double backward (`create_graph=True`)")
EVAL = Mode("backward in eval mode")
RETAIN = Mode("`retain_graph=True`")
ACCUMULATION = Mode("gradient accumulation")
CHECKPOINT = Mode("activation checkpointing, reentrant or not")
FUNC_GRAD = Mode("`torch.func.grad`, `functional_call`")
PER_SAMPLE = Mode("per-sample gradients: `vmap` of `grad`")
ENSEMBLE = Mode(
    "`vmap` over weights",
    (
        Limit(
            "PyTorch's operator has no batching rule", ("torch",), RuntimeError, "Batching rule not implemented",
            ("LSTM", "GRU", "RNN", "LSTMCell"),
        ),
    ),
)  # fmt: skip
JACREV = Mode("`torch.func.jacrev`")
BATCHED = Mode("`torch.autograd.grad(is_grads_batched=True)`")
JVP = Mode("`torch.func.jvp`", (NO_FORWARD,))
HESSIAN = Mode("`torch.func.hessian`", (NO_FORWARD,))
INFERENCE = Mode("`torch.inference_mode`")
THREADS = Mode("calls from several threads")

# Modules
HOOKS = Mode("forward hooks and pre-hooks, full backward hooks and pre-hooks")
WEIGHT_NORM = Mode("`parametrizations.weight_norm`")
SPECTRAL_NORM = Mode("`parametrizations.spectral_norm`")
ORTHOGONAL = Mode("`parametrizations.orthogonal`")
WEIGHT_DROP = Mode("weight drop (AWD-LSTM) as a parametrization")
PARAMETRIZED = Mode("`accelerate` of a parametrized module, and `undo`")
PRUNE = Mode("`torch.nn.utils.prune`")
DEEPCOPY = Mode("`copy.deepcopy`, `copy.copy`")
PICKLE = Mode("pickling, `torch.save` and `torch.load`")
ASSIGN = Mode("`load_state_dict(assign=True)`, built on the meta device")
META = Mode(
    "a call on the meta device",
    (Limit("the fused CPU kernels run on the CPU; `auto` infers the shapes", ("cpu",), match="the input is on meta"),),
)
SKIP_INIT = Mode("`torch.nn.utils.skip_init`")
EMA = Mode("`AveragedModel` (EMA)")

# Several processes
DDP = Mode("`DistributedDataParallel`, two processes")
FSDP = Mode("FSDP2 (`fully_shard`), two processes")

FAMILIES = {
    "numbers": (AUTOCAST, SCALER, BF16, HALF, DOUBLE, DETERMINISTIC),
    "compilers": (
        COMPILE, COMPILE_ROWS, COMPILE_STEPS, EXPORT, EXPORT_STEPS, ONNX, ONNX_TRACED, SCRIPT, TRACE_ROWS, TRACE_STEPS,
        QUANTIZE,
    ),
    "gradients": (
        DOUBLE_BACKWARD, EVAL, RETAIN, ACCUMULATION, CHECKPOINT, FUNC_GRAD, PER_SAMPLE, ENSEMBLE, JACREV, BATCHED, JVP,
        HESSIAN,
    ),
    "calls": (INFERENCE, THREADS, HOOKS),
    "weights": (WEIGHT_NORM, SPECTRAL_NORM, ORTHOGONAL, WEIGHT_DROP, PARAMETRIZED, PRUNE),
    "copies": (DEEPCOPY, PICKLE, ASSIGN, META, SKIP_INIT, EMA),
    "processes": (DDP, FSDP),
}  # fmt: skip
