"""The part of caffe.proto that kd reads, declared in a descriptor pool of its own.

The pool is private because the same names clash in the default pool once another package registers the real
caffe.proto. Field numbers are Caffe's (BVLC/caffe, src/caffe/proto/caffe.proto); fields that are not listed are
skipped. Two declarations differ from Caffe's with the same bytes on disk: packed weights (`data`, `double_data`)
are `bytes`, which avoids one Python object a value, and sizes that Caffe declares once are repeated.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "kd_caffe"

V1_TYPES = {  # V1's enum value → type in V2; the order is that of the numbers, from 0
    "NONE": "None", "ACCURACY": "Accuracy", "BNLL": "BNLL", "CONCAT": "Concat",
    "CONVOLUTION": "Convolution", "DATA": "Data", "DROPOUT": "Dropout", "EUCLIDEAN_LOSS": "EuclideanLoss",
    "FLATTEN": "Flatten", "HDF5_DATA": "HDF5Data", "HDF5_OUTPUT": "HDF5Output", "IM2COL": "Im2col",
    "IMAGE_DATA": "ImageData", "INFOGAIN_LOSS": "InfogainLoss", "INNER_PRODUCT": "InnerProduct",
    "LRN": "LRN", "MULTINOMIAL_LOGISTIC_LOSS": "MultinomialLogisticLoss", "POOLING": "Pooling",
    "RELU": "ReLU", "SIGMOID": "Sigmoid", "SOFTMAX": "Softmax", "SOFTMAX_LOSS": "SoftmaxWithLoss",
    "SPLIT": "Split", "TANH": "TanH", "WINDOW_DATA": "WindowData", "ELTWISE": "Eltwise", "POWER": "Power",
    "SIGMOID_CROSS_ENTROPY_LOSS": "SigmoidCrossEntropyLoss", "HINGE_LOSS": "HingeLoss",
    "MEMORY_DATA": "MemoryData", "ARGMAX": "ArgMax", "THRESHOLD": "Threshold", "DUMMY_DATA": "DummyData",
    "SLICE": "Slice", "MVN": "MVN", "ABSVAL": "AbsVal", "SILENCE": "Silence",
    "CONTRASTIVE_LOSS": "ContrastiveLoss", "EXP": "Exp", "DECONVOLUTION": "Deconvolution",
}  # fmt: skip

_ENUMS: dict[str, dict[str, int]] = {
    "Phase": {"TRAIN": 0, "TEST": 1},
    "PoolMethod": {"MAX": 0, "AVE": 1, "STOCHASTIC": 2},
    "RoundMode": {"CEIL": 0, "FLOOR": 1},
    "NormRegion": {"ACROSS_CHANNELS": 0, "WITHIN_CHANNEL": 1},
    "EltwiseOp": {"PROD": 0, "SUM": 1, "MAX": 2},
    "ReductionOp": {"SUM": 1, "ASUM": 2, "SUMSQ": 3, "MEAN": 4},
    "V1Type": {name: number for number, name in enumerate(V1_TYPES)},
}

# A field is `name number type [default]`; `*` after the type marks a repeated field.
_MESSAGES: dict[str, str] = {
    "BlobShape": "dim 1 int64*",
    "BlobProto": """
        num 1 int32; channels 2 int32; height 3 int32; width 4 int32
        data 5 bytes*; shape 7 BlobShape; double_data 8 bytes*
    """,
    "NetState": "phase 1 Phase TEST; level 2 int32 0; stage 3 string*",
    "NetStateRule": """
        phase 1 Phase; min_level 2 int32; max_level 3 int32; stage 4 string*; not_stage 5 string*
    """,
    "TransformationParameter": "scale 1 float 1; crop_size 3 uint32 0; mean_file 4 string; mean_value 5 float*",
    # Fields of the data layers that transform_param replaced
    "DataParameter": "scale 2 float 1; mean_file 3 string; crop_size 5 uint32 0",
    "WindowDataParameter": "scale 2 float 1; mean_file 3 string; crop_size 5 uint32 0",
    "InputParameter": "shape 1 BlobShape*",
    "BatchNormParameter": "use_global_stats 1 bool; moving_average_fraction 2 float 0.999; eps 3 float 1e-5",
    "BiasParameter": "axis 1 int32 1; num_axes 2 int32 1",
    "ConcatParameter": "concat_dim 1 uint32 1; axis 2 int32 1",
    "ConvolutionParameter": """
        num_output 1 uint32; bias_term 2 bool true; pad 3 uint32*; kernel_size 4 uint32*; group 5 uint32 1
        stride 6 uint32*; pad_h 9 uint32; pad_w 10 uint32; kernel_h 11 uint32; kernel_w 12 uint32
        stride_h 13 uint32; stride_w 14 uint32; axis 16 int32 1; dilation 18 uint32*
    """,
    "CropParameter": "axis 1 int32 2; offset 2 uint32*",
    "DropoutParameter": "dropout_ratio 1 float 0.5; scale_train 2 bool true",
    "ELUParameter": "alpha 1 float 1",
    "EltwiseParameter": "operation 1 EltwiseOp SUM; coeff 2 float*",
    "ExpParameter": "base 1 float -1; scale 2 float 1; shift 3 float 0",
    "FlattenParameter": "axis 1 int32 1; end_axis 2 int32 -1",
    "InnerProductParameter": """
        num_output 1 uint32; bias_term 2 bool true; axis 5 int32 1; transpose 6 bool false
    """,
    "LRNParameter": """
        local_size 1 uint32 5; alpha 2 float 1; beta 3 float 0.75; norm_region 4 NormRegion ACROSS_CHANNELS
        k 5 float 1
    """,
    "LogParameter": "base 1 float -1; scale 2 float 1; shift 3 float 0",
    "MVNParameter": "normalize_variance 1 bool true; across_channels 2 bool false; eps 3 float 1e-9",
    "PReLUParameter": "channel_shared 2 bool false",
    "PoolingParameter": """
        pool 1 PoolMethod MAX; kernel_size 2 uint32*; stride 3 uint32*; pad 4 uint32*; kernel_h 5 uint32
        kernel_w 6 uint32; stride_h 7 uint32; stride_w 8 uint32; pad_h 9 uint32; pad_w 10 uint32
        global_pooling 12 bool false; round_mode 13 RoundMode CEIL
        ceil_mode 1000 bool true
    """,
    "PowerParameter": "power 1 float 1; scale 2 float 1; shift 3 float 0",
    "ReLUParameter": "negative_slope 1 float 0",
    "ReductionParameter": "operation 1 ReductionOp SUM; axis 2 int32 0; coeff 3 float 1",
    "ReshapeParameter": "shape 1 BlobShape; axis 2 int32 0; num_axes 3 int32 -1",
    "ScaleParameter": "axis 1 int32 1; num_axes 2 int32 1; bias_term 4 bool false",
    "SliceParameter": "slice_dim 1 uint32 1; slice_point 2 uint32*; axis 3 int32 1",
    "SoftmaxParameter": "axis 2 int32 1",
    "V0LayerParameter": "",  # recognised, not read
    "LayerParameter": """
        name 1 string; type 2 string; bottom 3 string*; top 4 string*; loss_weight 5 float*; blobs 7 BlobProto*
        include 8 NetStateRule*; exclude 9 NetStateRule*; phase 10 Phase
        transform_param 100 TransformationParameter; concat_param 104 ConcatParameter
        convolution_param 106 ConvolutionParameter; data_param 107 DataParameter
        dropout_param 108 DropoutParameter; eltwise_param 110 EltwiseParameter; exp_param 111 ExpParameter
        image_data_param 115 DataParameter; inner_product_param 117 InnerProductParameter
        lrn_param 118 LRNParameter; mvn_param 120 MVNParameter
        pooling_param 121 PoolingParameter; power_param 122 PowerParameter; relu_param 123 ReLUParameter
        softmax_param 125 SoftmaxParameter; slice_param 126 SliceParameter
        window_data_param 129 WindowDataParameter; prelu_param 131 PReLUParameter
        reshape_param 133 ReshapeParameter; log_param 134 LogParameter; flatten_param 135 FlattenParameter
        reduction_param 136 ReductionParameter; batch_norm_param 139 BatchNormParameter
        elu_param 140 ELUParameter; bias_param 141 BiasParameter; scale_param 142 ScaleParameter
        input_param 143 InputParameter; crop_param 144 CropParameter
    """,
    "V1LayerParameter": """
        layer 1 V0LayerParameter; bottom 2 string*; top 3 string*; name 4 string; type 5 V1Type
        blobs 6 BlobProto*
        concat_param 9 ConcatParameter; convolution_param 10 ConvolutionParameter; data_param 11 DataParameter
        dropout_param 12 DropoutParameter; image_data_param 15 DataParameter
        inner_product_param 17 InnerProductParameter; lrn_param 18 LRNParameter
        pooling_param 19 PoolingParameter; window_data_param 20 WindowDataParameter
        power_param 21 PowerParameter; eltwise_param 24 EltwiseParameter
        relu_param 30 ReLUParameter; slice_param 31 SliceParameter
        include 32 NetStateRule*; exclude 33 NetStateRule*; mvn_param 34 MVNParameter; loss_weight 35 float*
        transform_param 36 TransformationParameter; softmax_param 39 SoftmaxParameter
        exp_param 41 ExpParameter
    """,
    "NetParameter": """
        name 1 string; layers 2 V1LayerParameter*; input 3 string*; input_dim 4 int32*; state 6 NetState
        input_shape 8 BlobShape*
        layer 100 LayerParameter*
    """,
}

_SCALARS = {"bool", "bytes", "float", "int32", "int64", "string", "uint32"}


def _messages() -> dict[str, type[Any]]:
    """Classes of the messages, by full name."""
    file = descriptor_pb2.FileDescriptorProto(name="kd_caffe.proto", package=_PACKAGE, syntax="proto2")
    for enum, values in _ENUMS.items():
        # Values of enums at file level share one namespace, so each enum is nested in a message of its own
        declared = file.message_type.add(name=f"{enum}Enum").enum_type.add(name=enum)
        for name, number in values.items():
            declared.value.add(name=name, number=number)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields.replace("\n", ";").split(";"):
            if field.strip():
                _declare(message, *field.split())
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClassesForFiles([file.name], pool)


def _declare(
    message: descriptor_pb2.DescriptorProto, name: str, number: str, kind: str, default: str | None = None
) -> None:
    label = "LABEL_REPEATED" if kind.endswith("*") else "LABEL_OPTIONAL"
    kind = kind.removesuffix("*")
    field = message.field.add(name=name, number=int(number), label=label, default_value=default)
    if kind in _SCALARS:
        field.type = descriptor_pb2.FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")
    else:
        field.type_name = f".{_PACKAGE}.{kind}Enum.{kind}" if kind in _ENUMS else f".{_PACKAGE}.{kind}"


_CLASSES = _messages()
NetParameter: Any = _CLASSES[f"{_PACKAGE}.NetParameter"]
BlobProto: Any = _CLASSES[f"{_PACKAGE}.BlobProto"]
