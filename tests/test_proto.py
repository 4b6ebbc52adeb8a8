"""What ``proto/`` says, and that ``mm/pb`` says the same.

The tables are the contract with clients, runtimes and controllers that exist (spec wire); the
public protocols are compared with what other packages ship.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from grpc_reflection.v1alpha import reflection_pb2
from tritonclient.grpc import service_pb2

import mm.pb.inference
import mm.pb.mm.peer
import mm.pb.mm.testing
import mm.pb.mmesh

ROOT = Path(__file__).resolve().parents[1]

#: Message -> fields in order of number, as "name:type=number"; "*" repeated.
MESSAGES = {
    "RegisterModelRequest": "modelId:string=1 modelInfo:ModelInfo=2 loadNow:bool=3 sync:bool=4"
    " lastUsedTime:uint64=5",
    "ModelInfo": "type:string=1 path:string=2 key:string=3",
    "ModelStatusInfo": "status:ModelStatusInfo.ModelStatus=1 errors:*string=2"
    " modelCopyInfos:*ModelStatusInfo.ModelCopyInfo=3",
    "ModelStatusInfo.ModelCopyInfo": "location:string=1"
    " copyStatus:ModelStatusInfo.ModelStatus=2 time:uint64=3",
    "UnregisterModelRequest": "modelId:string=1",
    "UnregisterModelResponse": "",
    "GetStatusRequest": "modelId:string=1",
    "EnsureLoadedRequest": "modelId:string=1 lastUsedTime:uint64=2 sync:bool=4",
    "VModelStatusInfo": "status:VModelStatusInfo.VModelStatus=1 activeModelId:string=2"
    " targetModelId:string=3 activeModelStatus:ModelStatusInfo=4"
    " targetModelStatus:ModelStatusInfo=5 owner:string=6",
    "DeleteVModelRequest": "vModelId:string=1 owner:string=2",
    "DeleteVModelResponse": "",
    "SetVModelRequest": "vModelId:string=1 targetModelId:string=2 updateOnly:bool=3"
    " modelInfo:ModelInfo=4 autoDeleteTargetModel:bool=5 loadNow:bool=6 force:bool=7 sync:bool=8"
    " expectedTargetModelId:string=9 owner:string=10",
    "GetVModelStatusRequest": "vModelId:string=1 owner:string=2",
    "LoadModelRequest": "modelId:string=1 modelType:string=2 modelPath:string=3 modelKey:string=4",
    "LoadModelResponse": "sizeInBytes:uint64=1 maxConcurrency:uint32=2",
    "UnloadModelRequest": "modelId:string=1",
    "UnloadModelResponse": "",
    "PredictModelSizeRequest": "modelId:string=1 modelType:string=2 modelPath:string=3"
    " modelKey:string=4",
    "PredictModelSizeResponse": "sizeInBytes:uint64=1",
    "ModelSizeRequest": "modelId:string=1",
    "ModelSizeResponse": "sizeInBytes:uint64=1",
    "RuntimeStatusRequest": "",
    "RuntimeStatusResponse": "status:RuntimeStatusResponse.Status=1 capacityInBytes:uint64=2"
    " maxLoadingConcurrency:uint32=3 modelLoadingTimeoutMs:uint32=4"
    " defaultModelSizeInBytes:uint64=5 runtimeVersion:string=6 numericRuntimeVersion:uint64=7"
    " methodInfos:*RuntimeStatusResponse.MethodInfosEntry=8 limitModelConcurrency:bool=9"
    " allowAnyMethod:bool=10",
    "RuntimeStatusResponse.MethodInfosEntry": "key:string=1"
    " value:RuntimeStatusResponse.MethodInfo=2",
    "RuntimeStatusResponse.MethodInfo": "idInjectionPath:*uint32=1",
    "PredictRequest": "modelName:string=1 text:string=2",
    "PredictResponse": "results:*CategoryAndConfidence=1",
    "MultiPredictResponse": "perModelResults:*MultiPredictResponse.PerModelResultsEntry=1",
    "MultiPredictResponse.PerModelResultsEntry": "key:string=1 value:PredictResponse=2",
    "CategoryAndConfidence": "category:string=1 confidence:float=2",
}

ENUMS = {
    "ModelStatusInfo.ModelStatus": {
        "NOT_FOUND": 0, "NOT_LOADED": 1, "LOADING": 2, "LOADED": 3, "LOADING_FAILED": 4,
        "UNKNOWN": 5,
    },
    "VModelStatusInfo.VModelStatus": {
        "NOT_FOUND": 0, "DEFINED": 1, "TRANSITIONING": 2, "TRANSITION_FAILED": 3, "UNKNOWN": 5,
    },
    "RuntimeStatusResponse.Status": {"STARTING": 0, "READY": 1, "FAILING": 2},
}  # fmt: skip

#: Service -> methods as "name(request)response".
SERVICES = {
    "ModelMesh": [
        "registerModel(RegisterModelRequest)ModelStatusInfo",
        "unregisterModel(UnregisterModelRequest)UnregisterModelResponse",
        "getModelStatus(GetStatusRequest)ModelStatusInfo",
        "ensureLoaded(EnsureLoadedRequest)ModelStatusInfo",
        "setVModel(SetVModelRequest)VModelStatusInfo",
        "deleteVModel(DeleteVModelRequest)DeleteVModelResponse",
        "getVModelStatus(GetVModelStatusRequest)VModelStatusInfo",
    ],
    "ModelRuntime": [
        "loadModel(LoadModelRequest)LoadModelResponse",
        "unloadModel(UnloadModelRequest)UnloadModelResponse",
        "predictModelSize(PredictModelSizeRequest)PredictModelSizeResponse",
        "modelSize(ModelSizeRequest)ModelSizeResponse",
        "runtimeStatus(RuntimeStatusRequest)RuntimeStatusResponse",
    ],
    "ExamplePredictor": [
        "predict(PredictRequest)PredictResponse",
        "multiPredict(PredictRequest)MultiPredictResponse",
    ],
}

#: What ours has beside it: messages of its own, fields from 100 of the contract's, and methods.
OWN_MESSAGES = {
    "SetModelPolicyRequest": "modelId:string=1 min_copies:int32=2 pinned:bool=3",
    "ListModelsRequest": "page_size:int32=1 page_token:string=2 id_prefix:string=3 type:string=4"
    " status:ModelStatusInfo.ModelStatus=5",
    "ListModelsResponse": "models:*ListedModel=1 next_page_token:string=2",
    "ListedModel": "model_id:string=1 type:string=2 path:string=3 status:ModelStatusInfo=4"
    " last_used_ms:uint64=5 size_bytes:uint64=6 references:int32=7 vmodel_ids:*string=8"
    " min_copies:int32=9 pinned:bool=10",
    "ListVModelsRequest": "page_size:int32=1 page_token:string=2 id_prefix:string=3 owner:string=4"
    " status:VModelStatusInfo.VModelStatus=5",
    "ListVModelsResponse": "vmodels:*ListedVModel=1 next_page_token:string=2",
    "ListedVModel": "vmodel_id:string=1 owner:string=2 active_model_id:string=3"
    " target_model_id:string=4 status:VModelStatusInfo.VModelStatus=5",
    "WatchRequest": "id:string=1 id_prefix:string=2",
    "ModelPolicyInfo": "min_copies:int32=1 pinned:bool=2 ready_copies:int32=3 unmet:string=4",
}
OWN_FIELDS = {"RegisterModelRequest": "min_copies:int32=100 pinned:bool=101"}
OWN_METHODS = {
    "setModelPolicy(SetModelPolicyRequest)ModelPolicyInfo",
    "listModels(ListModelsRequest)ListModelsResponse",
    "listVModels(ListVModelsRequest)ListVModelsResponse",
}

FieldProto = descriptor_pb2.FieldDescriptorProto


@pytest.fixture(scope="module")
def files() -> dict[str, descriptor_pb2.FileDescriptorProto]:
    data = (ROOT / "mm" / "pb" / "descriptors.bin").read_bytes()
    return {file.name: file for file in descriptor_pb2.FileDescriptorSet.FromString(data).file}


def declarations(
    files: dict[str, descriptor_pb2.FileDescriptorProto], package: str
) -> tuple[dict[str, descriptor_pb2.DescriptorProto], dict[str, dict[str, int]]]:
    """Answer the messages and enums of a package by name without the package."""
    messages: dict[str, descriptor_pb2.DescriptorProto] = {}
    enums: dict[str, dict[str, int]] = {}

    def walk(message: descriptor_pb2.DescriptorProto, prefix: str) -> None:
        name = prefix + message.name
        messages[name] = message
        for enum in message.enum_type:
            enums[f"{name}.{enum.name}"] = {value.name: value.number for value in enum.value}
        for nested in message.nested_type:
            walk(nested, f"{name}.")

    for file in files.values():
        if file.package == package:
            for message in file.message_type:
                walk(message, "")
    return messages, enums


def field_text(field: descriptor_pb2.FieldDescriptorProto, package: str) -> str:
    type_name = (
        field.type_name.removeprefix(f".{package}.")
        or FieldProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    )
    repeated = "*" if field.label == FieldProto.LABEL_REPEATED else ""
    return f"{field.name}:{repeated}{type_name}={field.number}"


def test_mmesh_messages_are_the_wire_contract(
    files: dict[str, descriptor_pb2.FileDescriptorProto],
) -> None:
    messages, enums = declarations(files, "mmesh")
    texts = {
        name: " ".join(
            field_text(field, "mmesh")
            for field in sorted(message.field, key=lambda field: field.number)
        )
        for name, message in messages.items()
    }
    extended = {name: f"{MESSAGES[name]} {fields}" for name, fields in OWN_FIELDS.items()}
    assert texts == {**MESSAGES, **OWN_MESSAGES, **extended}
    assert enums == ENUMS
    assert [(r.start, r.end) for r in messages["EnsureLoadedRequest"].reserved_range] == [(3, 4)]


def test_mmesh_services_are_the_wire_contract(
    files: dict[str, descriptor_pb2.FileDescriptorProto],
) -> None:
    services = {
        service.name: [
            f"{method.name}({method.input_type.removeprefix('.mmesh.')})"
            f"{method.output_type.removeprefix('.mmesh.')}"
            for method in service.method
            if not (method.client_streaming or method.server_streaming)
        ]
        for file in files.values()
        if file.package == "mmesh"
        for service in file.service
    }
    services["ModelMesh"] = [each for each in services["ModelMesh"] if each not in OWN_METHODS]
    assert services == SERVICES


@pytest.mark.parametrize(
    ("name", "theirs", "methods"),
    [
        (
            "grpc_predict_v2.proto",
            service_pb2.DESCRIPTOR,
            ["ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata",
             "ModelInfer"],
        ),
        (
            "grpc/reflection/v1alpha/reflection.proto",
            reflection_pb2.DESCRIPTOR,
            ["ServerReflectionInfo"],
        ),
    ],
)  # fmt: skip
def test_public_protocols_are_what_others_ship(
    files: dict[str, descriptor_pb2.FileDescriptorProto],
    name: str,
    theirs: object,
    methods: list[str],
) -> None:
    shipped = descriptor_pb2.FileDescriptorProto()
    theirs.CopyToProto(shipped)  # type: ignore[attr-defined]
    ours = files[name]
    assert ours.package == shipped.package
    shipped_messages = {message.name: comparable(message) for message in shipped.message_type}
    for message in ours.message_type:
        assert comparable(message) == shipped_messages[message.name]
    [service], [shipped_service] = ours.service, shipped.service
    assert service.name == shipped_service.name
    assert [method.name for method in service.method] == methods
    shipped_methods = {method.name: signature(method) for method in shipped_service.method}
    for method in service.method:
        assert signature(method) == shipped_methods[method.name]


def signature(method: descriptor_pb2.MethodDescriptorProto) -> tuple[str, str, bool, bool]:
    return (
        method.input_type,
        method.output_type,
        method.client_streaming,
        method.server_streaming,
    )


def comparable(message: descriptor_pb2.DescriptorProto) -> descriptor_pb2.DescriptorProto:
    """A copy without what says nothing about the wire: JSON names, the order of nested types."""
    copy = descriptor_pb2.DescriptorProto()
    copy.CopyFrom(message)
    pending = [copy]
    while pending:
        current = pending.pop()
        for field in current.field:
            field.ClearField("json_name")
        nested = sorted(current.nested_type, key=lambda nested: nested.name)
        del current.nested_type[:]
        current.nested_type.extend(nested)
        pending.extend(current.nested_type)
    return copy


def test_health_and_reflection_v1_are_the_public_ones(
    files: dict[str, descriptor_pb2.FileDescriptorProto],
) -> None:
    messages, enums = declarations(files, "grpc.health.v1")
    assert enums == {
        "HealthCheckResponse.ServingStatus": {
            "UNKNOWN": 0, "SERVING": 1, "NOT_SERVING": 2, "SERVICE_UNKNOWN": 3,
        }
    }  # fmt: skip
    assert [field_text(field, "") for field in messages["HealthCheckRequest"].field] == [
        "service:string=1"
    ]
    assert signature(files["grpc/health/v1/health.proto"].service[0].method[1])[2:] == (False, True)
    # Version 1 of reflection is v1alpha under another package.
    old = files["grpc/reflection/v1alpha/reflection.proto"]
    text = text_format.MessageToString(old).replace("v1alpha", "v1")
    renamed = text_format.Parse(text, descriptor_pb2.FileDescriptorProto())
    assert renamed == files["grpc/reflection/v1/reflection.proto"]


def test_generated_messages_write_what_protobuf_reads(
    files: dict[str, descriptor_pb2.FileDescriptorProto],
) -> None:
    """Fill every field of every generated message and read it back with Google's protobuf."""
    pool = descriptor_pool.DescriptorPool()
    for file in files.values():
        pool.Add(file)
    checked = 0
    for package, module in (
        ("mmesh", mm.pb.mmesh),
        ("inference", mm.pb.inference),
        ("mm.peer", mm.pb.mm.peer),
        ("mm.testing", mm.pb.mm.testing),
    ):
        for name, message in declarations(files, package)[0].items():
            if message.options.map_entry:
                continue
            generated = getattr(module, name.replace(".", ""))
            theirs = message_factory.GetMessageClass(
                pool.FindMessageTypeByName(f"{package}.{name}")
            )()
            for field in message.field:
                fill(theirs, field)
            ours = generated.parse(theirs.SerializeToString())
            assert not ours._unknown_fields
            again = type(theirs).FromString(bytes(ours))
            assert again == theirs
            checked += 1
    assert checked > 40


def fill(message: object, field: descriptor_pb2.FieldDescriptorProto) -> None:
    """Set a scalar field to something that is not its default."""
    if field.type in (FieldProto.TYPE_MESSAGE, FieldProto.TYPE_GROUP):
        return
    value: object = {
        FieldProto.TYPE_STRING: f"größe {field.number}",
        FieldProto.TYPE_BYTES: bytes([0, 255, field.number]),
        FieldProto.TYPE_BOOL: True,
        FieldProto.TYPE_FLOAT: 0.5,
        FieldProto.TYPE_DOUBLE: -0.1,
        FieldProto.TYPE_ENUM: 1,
    }.get(field.type, 1000 + field.number)
    if field.label == FieldProto.LABEL_REPEATED:
        getattr(message, field.name).extend([value, value])
    else:
        setattr(message, field.name, value)


def test_every_proto_file_is_in_the_descriptor_set(
    files: dict[str, descriptor_pb2.FileDescriptorProto],
) -> None:
    proto = ROOT / "proto"
    assert set(files) == {str(path.relative_to(proto)) for path in proto.rglob("*.proto")}


def test_numbers_of_our_own_protocols(
    files: dict[str, descriptor_pb2.FileDescriptorProto],
) -> None:
    messages, _ = declarations(files, "mm.peer")
    assert [(f.name, f.number) for f in messages["Identity"].field] == [
        ("instance_id", 1),
        ("start_time_ms", 2),
        ("version", 3),
        ("protocol_version", 4),
        ("unready_because", 5),
    ]
    statistics = messages["InstanceStatistics"].field
    numbers = [field.number for field in statistics]
    assert len(set(numbers)) == len(numbers)
    assert set(range(1, 39)) <= set(numbers)
    assert (statistics[17].name, statistics[19].name) == ("store_connected", "instances")
    assert [(f.name, f.number) for f in messages["Partition"].field] == [
        ("prohibited_types", 1),
        ("instances", 2),
        ("capacity_units", 3),
        ("free_units", 4),
        ("copies", 5),
        ("lru_time_ms", 6),
    ]


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    check = subprocess.run(
        [sys.executable, str(ROOT / "proto" / "generate.py"), "--check"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stderr
