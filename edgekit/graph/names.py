"""Which operator of one format is which of another: tables, with ONNX's names as the common ones.

A native operator may stand for several ONNX ones (FULLY_CONNECTED for Gemm and MatMul); the first
is its canonical name. Activations that are fused into an operator do not change what it is.
"""

from __future__ import annotations

from functools import cache

__all__ = ["canonical_name", "native_names"]

_TFLITE = {
    "ABS": "Abs", "ADD": "Add", "ADD_N": "Sum", "ARG_MAX": "ArgMax", "ARG_MIN": "ArgMin",
    "ATAN2": "", "AVERAGE_POOL_2D": "AveragePool GlobalAveragePool", "BATCH_MATMUL": "MatMul",
    "BATCH_TO_SPACE_ND": "", "BIDIRECTIONAL_SEQUENCE_LSTM": "LSTM",
    "BIDIRECTIONAL_SEQUENCE_RNN": "RNN", "BITCAST": "BitCast", "BITWISE_XOR": "BitwiseXor",
    "BROADCAST_TO": "Expand", "CAST": "Cast", "CEIL": "Ceil", "CONCATENATION": "Concat",
    "CONV_2D": "Conv", "CONV_3D": "Conv", "CONV_3D_TRANSPOSE": "ConvTranspose", "COS": "Cos",
    "CUMSUM": "CumSum", "DEPTHWISE_CONV_2D": "Conv", "DEPTH_TO_SPACE": "DepthToSpace",
    "DEQUANTIZE": "DequantizeLinear", "DIV": "Div", "DYNAMIC_UPDATE_SLICE": "ScatterND",
    "ELU": "Elu", "EMBEDDING_LOOKUP": "Gather", "EQUAL": "Equal", "EXP": "Exp",
    "EXPAND_DIMS": "Unsqueeze", "FILL": "ConstantOfShape Expand", "FLOOR": "Floor",
    "FLOOR_MOD": "Mod", "FULLY_CONNECTED": "Gemm MatMul", "GATHER": "Gather",
    "GATHER_ND": "GatherND", "GELU": "Gelu", "GREATER": "Greater",
    "GREATER_EQUAL": "GreaterOrEqual", "HARD_SWISH": "HardSwish", "IF": "If",
    "L2_NORMALIZATION": "LpNormalization", "L2_POOL_2D": "LpPool", "LEAKY_RELU": "LeakyRelu",
    "LESS": "Less", "LESS_EQUAL": "LessOrEqual", "LOCAL_RESPONSE_NORMALIZATION": "LRN",
    "LOG": "Log", "LOGICAL_AND": "And", "LOGICAL_NOT": "Not", "LOGICAL_OR": "Or",
    "LOGISTIC": "Sigmoid", "LOG_SOFTMAX": "LogSoftmax", "LSTM": "LSTM", "MAXIMUM": "Max",
    "MAX_POOL_2D": "MaxPool GlobalMaxPool", "MEAN": "ReduceMean GlobalAveragePool",
    "MINIMUM": "Min", "MIRROR_PAD": "Pad", "MUL": "Mul", "MULTINOMIAL": "Multinomial",
    "NEG": "Neg", "NON_MAX_SUPPRESSION_V4": "NonMaxSuppression",
    "NON_MAX_SUPPRESSION_V5": "NonMaxSuppression", "NOT_EQUAL": "", "ONE_HOT": "OneHot",
    "PACK": "Concat", "PAD": "Pad", "PADV2": "Pad", "POW": "Pow", "PRELU": "PRelu",
    "QUANTIZE": "QuantizeLinear", "RANDOM_STANDARD_NORMAL": "RandomNormal",
    "RANDOM_UNIFORM": "RandomUniform", "RANGE": "Range", "RANK": "", "REDUCE_ALL": "",
    "REDUCE_ANY": "", "REDUCE_MAX": "ReduceMax GlobalMaxPool", "REDUCE_MIN": "ReduceMin",
    "REDUCE_PROD": "ReduceProd", "RELU": "Relu", "RELU6": "Clip", "RELU_0_TO_1": "Clip",
    "RELU_N1_TO_1": "Clip", "RESHAPE": "Reshape Flatten", "RESIZE_BILINEAR": "Resize",
    "RESIZE_NEAREST_NEIGHBOR": "Resize", "REVERSE_SEQUENCE": "ReverseSequence",
    "REVERSE_V2": "", "RFFT2D": "DFT", "RIGHT_SHIFT": "BitShift", "RNN": "RNN",
    "ROUND": "Round", "RSQRT": "", "SCATTER_ND": "ScatterND", "SELECT": "Where",
    "SELECT_V2": "Where", "SHAPE": "Shape", "SIGN": "Sign", "SIN": "Sin", "SLICE": "Slice",
    "SOFTMAX": "Softmax", "SPACE_TO_BATCH_ND": "", "SPACE_TO_DEPTH": "SpaceToDepth",
    "SPLIT": "Split", "SPLIT_V": "Split", "SQRT": "Sqrt", "SQUARE": "",
    "SQUARED_DIFFERENCE": "", "SQUEEZE": "Squeeze", "STRIDED_SLICE": "Slice", "SUB": "Sub",
    "SUM": "ReduceSum", "SVDF": "", "TANH": "Tanh", "TILE": "Tile", "TOPK_V2": "TopK",
    "TRANSPOSE": "Transpose", "TRANSPOSE_CONV": "ConvTranspose",
    "UNIDIRECTIONAL_SEQUENCE_LSTM": "LSTM", "UNIDIRECTIONAL_SEQUENCE_RNN": "RNN",
    "UNIQUE": "Unique", "UNPACK": "Split", "WHERE": "NonZero", "WHILE": "Loop",
    "ZEROS_LIKE": "ConstantOfShape",
    # StableHLO operators, as far as newer converters leave them in
    "STABLEHLO_ABS": "Abs", "STABLEHLO_ADD": "Add", "STABLEHLO_AND": "And",
    "STABLEHLO_BROADCAST_IN_DIM": "Expand", "STABLEHLO_CLAMP": "Clip",
    "STABLEHLO_CONCATENATE": "Concat", "STABLEHLO_CONVERT": "Cast",
    "STABLEHLO_CONVOLUTION": "Conv", "STABLEHLO_COSINE": "Cos", "STABLEHLO_DIVIDE": "Div",
    "STABLEHLO_DOT_GENERAL": "MatMul", "STABLEHLO_EXPONENTIAL": "Exp",
    "STABLEHLO_FLOOR": "Floor", "STABLEHLO_LOG": "Log", "STABLEHLO_LOGISTIC": "Sigmoid",
    "STABLEHLO_MAXIMUM": "Max", "STABLEHLO_MINIMUM": "Min", "STABLEHLO_MULTIPLY": "Mul",
    "STABLEHLO_NEGATE": "Neg", "STABLEHLO_OR": "Or", "STABLEHLO_PAD": "Pad",
    "STABLEHLO_POWER": "Pow", "STABLEHLO_REMAINDER": "Mod", "STABLEHLO_RESHAPE": "Reshape",
    "STABLEHLO_SELECT": "Where", "STABLEHLO_SLICE": "Slice", "STABLEHLO_SUBTRACT": "Sub",
    "STABLEHLO_TANH": "Tanh", "STABLEHLO_TRANSPOSE": "Transpose", "STABLEHLO_WHILE": "Loop",
    # custom operators of mediapipe
    "Convolution2DTransposeBias": "ConvTranspose", "MaxPoolingWithArgmax2D": "MaxPool",
    "MaxUnpooling2D": "MaxUnpool",
}  # fmt: skip

_OPENVINO = {
    "Abs": "Abs", "Acos": "Acos", "Acosh": "Acosh", "AdaptiveAvgPool": "",
    "AdaptiveMaxPool": "", "Add": "Add", "Asin": "Asin", "Asinh": "Asinh", "Atan": "Atan",
    "Atanh": "Atanh", "AvgPool": "AveragePool", "BatchNormInference": "BatchNormalization",
    "BitwiseAnd": "BitwiseAnd", "BitwiseLeftShift": "BitShift", "BitwiseNot": "BitwiseNot",
    "BitwiseOr": "BitwiseOr", "BitwiseRightShift": "BitShift", "BitwiseXor": "BitwiseXor",
    "Broadcast": "Expand", "Bucketize": "", "Ceiling": "Ceil", "Clamp": "Clip",
    "Col2Im": "Col2Im", "Concat": "Concat", "Convert": "Cast", "ConvertLike": "CastLike",
    "Convolution": "Conv", "ConvolutionBackpropData": "ConvTranspose", "Cos": "Cos",
    "Cosh": "Cosh", "CumSum": "CumSum", "DFT": "DFT", "DeformableConvolution": "DeformConv",
    "DepthToSpace": "DepthToSpace", "DetectionOutput": "", "Divide": "Div",
    "Einsum": "Einsum", "Elu": "Elu", "Equal": "Equal", "Erf": "Erf", "Exp": "Exp",
    "ExtractImagePatches": "", "Eye": "EyeLike", "FakeConvert": "",
    "FakeQuantize": "QuantizeLinear DequantizeLinear", "Floor": "Floor", "FloorMod": "Mod",
    "GRUCell": "GRU", "GRUSequence": "GRU", "Gather": "Gather",
    "GatherElements": "GatherElements", "GatherND": "GatherND", "Gelu": "Gelu",
    "Greater": "Greater", "GreaterEqual": "GreaterOrEqual", "GridSample": "GridSample",
    "GroupConvolution": "Conv", "GroupConvolutionBackpropData": "ConvTranspose",
    "GroupNormalization": "GroupNormalization", "HSigmoid": "HardSigmoid",
    "HSwish": "HardSwish", "HardSigmoid": "HardSigmoid", "IDFT": "DFT", "IRDFT": "DFT",
    "ISTFT": "", "If": "If", "Interpolate": "Resize", "Inverse": "", "IsFinite": "",
    "IsInf": "IsInf", "IsNaN": "IsNaN", "LRN": "LRN", "LSTMCell": "LSTM",
    "LSTMSequence": "LSTM", "Less": "Less", "LessEqual": "LessOrEqual", "Log": "Log",
    "LogSoftmax": "LogSoftmax", "LogicalAnd": "And", "LogicalNot": "Not", "LogicalOr": "Or",
    "LogicalXor": "Xor", "Loop": "Loop", "MVN": "MeanVarianceNormalization",
    "MatMul": "MatMul Gemm", "MaxPool": "MaxPool", "Maximum": "Max", "Minimum": "Min",
    "Mish": "Mish", "Mod": "Mod", "Multiply": "Mul", "MulticlassNms": "",
    "NonMaxSuppression": "NonMaxSuppression", "NonZero": "NonZero", "NormalizeL2": "",
    "NotEqual": "", "Negative": "Neg", "OneHot": "OneHot", "PRelu": "PRelu", "PSROIPooling": "",
    "Pad": "Pad", "Power": "Pow", "PriorBox": "", "PriorBoxClustered": "", "Proposal": "",
    "RDFT": "DFT", "RNNCell": "RNN", "RNNSequence": "RNN", "ROIAlign": "RoiAlign",
    "ROIPooling": "MaxRoiPool", "RandomUniform": "RandomUniform", "Range": "Range",
    "ReduceL1": "ReduceL1", "ReduceL2": "ReduceL2", "ReduceLogicalAnd": "",
    "ReduceLogicalOr": "", "ReduceMax": "ReduceMax GlobalMaxPool",
    "ReduceMean": "ReduceMean GlobalAveragePool", "ReduceMin": "ReduceMin",
    "ReduceProd": "ReduceProd", "ReduceSum": "ReduceSum", "RegionYolo": "", "Relu": "Relu",
    "ReorgYolo": "", "Reshape": "Reshape Flatten", "Reverse": "",
    "ReverseSequence": "ReverseSequence", "Roll": "", "Round": "Round", "STFT": "STFT",
    "ScaledDotProductAttention": "Attention", "ScatterElementsUpdate": "ScatterElements",
    "ScatterNDUpdate": "ScatterND", "ScatterUpdate": "", "Select": "Where", "Selu": "Selu",
    "ShapeOf": "Shape", "Sigmoid": "Sigmoid", "Sign": "Sign", "Sin": "Sin", "Sinh": "Sinh",
    "Slice": "Slice", "SoftPlus": "Softplus", "SoftSign": "Softsign", "Softmax": "Softmax",
    "SpaceToDepth": "SpaceToDepth", "Split": "Split", "Sqrt": "Sqrt", "SquaredDifference": "",
    "Squeeze": "Squeeze", "StridedSlice": "Slice", "Subtract": "Sub", "Swish": "Swish",
    "Tan": "Tan", "Tanh": "Tanh", "TensorIterator": "Scan", "Tile": "Tile", "TopK": "TopK",
    "Transpose": "Transpose", "Unique": "Unique", "Unsqueeze": "Unsqueeze",
    "VariadicSplit": "Split", "Xor": "Xor",
}  # fmt: skip

# ONNX Runtime's own operators (domain com.microsoft) that do what an ONNX one does: fused with
# an activation, quantized, or in another layout.
_MICROSOFT = {
    "Attention": "Attention", "BiasGelu": "Gelu", "BiasSoftmax": "Softmax",
    "ConvTransposeWithDynamicPads": "ConvTranspose", "CropAndResize": "",
    "DequantizeLinear": "DequantizeLinear", "DynamicQuantizeLSTM": "LSTM",
    "DynamicQuantizeMatMul": "MatMul", "FastGelu": "Gelu", "FusedConv": "Conv",
    "FusedGemm": "Gemm", "FusedMatMul": "MatMul", "FusedMatMulActivation": "MatMul",
    "GatherBlockQuantized": "Gather", "Gelu": "Gelu", "GridSample": "GridSample",
    "GroupNorm": "GroupNormalization", "GroupQueryAttention": "Attention",
    "Inverse": "", "MatMulBnb4": "MatMul", "MatMulFpQ4": "MatMul",
    "MatMulInteger16": "MatMulInteger", "MatMulIntegerToFloat": "MatMul",
    "MatMulNBits": "MatMul", "MultiHeadAttention": "Attention", "NhwcConv": "Conv",
    "NhwcFusedConv": "Conv", "NhwcMaxPool": "MaxPool", "QAttention": "Attention",
    "QGemm": "Gemm", "QLinearAdd": "Add", "QLinearAveragePool": "AveragePool",
    "QLinearConcat": "Concat", "QLinearConv": "QLinearConv",
    "QLinearGlobalAveragePool": "GlobalAveragePool", "QLinearLeakyRelu": "LeakyRelu",
    "QLinearMul": "Mul", "QLinearReduceMean": "ReduceMean", "QLinearSigmoid": "Sigmoid",
    "QLinearSoftmax": "Softmax", "QLinearWhere": "Where", "QuantizeLinear": "QuantizeLinear",
    "QuickGelu": "", "RotaryEmbedding": "RotaryEmbedding", "Rfft": "DFT", "Irfft": "DFT",
    "SkipLayerNormalization": "LayerNormalization", "TransposeMatMul": "MatMul",
    "Trilu": "Trilu", "Unique": "Unique",
}  # fmt: skip

_TABLES = {
    "tflite": _TFLITE,
    "openvino": _OPENVINO,
    "onnx": {f"com.microsoft:{name}": same for name, same in _MICROSOFT.items()},
}


def canonical_name(native: str, fmt: str) -> str | None:
    """The ONNX operator that does the same as a format's own one; None if none or not known.

    ONNX's own names stand for themselves (those without a domain).
    """
    if fmt == "onnx" and ":" not in native:
        return native
    return next(iter(_TABLES[fmt].get(native, "").split()), None)


@cache
def native_names(canonical: str, fmt: str) -> frozenset[str]:
    """What a format ("onnx", "tflite", "openvino") calls an ONNX operator, any of them; empty if
    it has none. In ONNX this is the name itself and com.microsoft's fused and quantized forms."""
    found = {native for native, names in _TABLES[fmt].items() if canonical in names.split()}
    return frozenset(found | ({canonical} if fmt == "onnx" else set()))
