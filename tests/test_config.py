"""The configuration: names, defaults, exclusions, and errors that say what to do."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest

from mm.config import Config
from mm.core.dataplane import DataplaneConfig, RpcConfig
from mm.core.ids import InstanceId
from mm.core.load_failures import FailureRules
from mm.endpoints import TcpEndpoint, UnixEndpoint
from mm.errors import ConfigError
from mm.known_variables import ELSEWHERE, MEANINGLESS
from mm.limits import Limits
from mm.log_settings import LogSettings

MEMORY = {"KV_STORE": "memory"}
ETCD = {
    "KV_STORE": "etcd:10.0.0.1:2379",
    "MM_SERVICE_NAME": "modelmesh-serving",
    "MM_ADVERTISE_ADDRESS": "10.0.0.7",
    "MM_INSTANCE_ID": "one",
}


def read(**variables: str) -> Config:
    return Config.from_environment(MEMORY | variables)


def error_of(variables: Mapping[str, str]) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.from_environment(variables)
    return str(caught.value)


def test_defaults_are_those_of_the_java_mesh() -> None:
    config = Config.from_environment(ETCD)
    assert config.grpc_port == 8033
    assert config.peer_port == 8080
    assert config.kv_prefix == "tas-runtime"
    assert config.runtime_endpoints == (
        UnixEndpoint("/tmp/mmesh/grpc.sock"),
        TcpEndpoint("localhost", 8085),
    )
    assert config.runtime_serving_endpoint is None
    assert config.message_bytes_max == 16777216
    assert config.headers_bytes_max == 8192
    assert config.multi_parallelism == 4
    assert config.models_max == 1_000_000
    assert config.load_failure_expiry_ms == 900_000
    assert config.failure_rules == FailureRules(900_000, 10_000, 3)
    assert config.min_churn_age_ms == config.copy_calls_max == 0
    assert config.eviction == "cost"
    assert config.probation_ms == 180_000
    assert config.shutdown_timeout_s == 30
    assert config.dataplane_config == DataplaneConfig()
    assert not config.kv_read_only
    assert config.logs == LogSettings()
    assert config.location == "10.0.0.7"
    assert (config.zone, config.labels) == ("", ())
    assert config.warnings == ()


def test_an_instance_is_of_the_version_that_is_said_else_of_the_release() -> None:
    released = read().version
    assert released > read(SERVICE_VERSION="kserve-20260401-7").version == 1_775_001_600_007
    assert read(SERVICE_VERSION="").version == released
    config = read(SERVICE_VERSION="1.2.3")
    assert config.version == released
    [warning] = config.warnings
    assert warning.startswith('SERVICE_VERSION="1.2.3" has not the form <name>-YYYYMMDD-<number>')


def test_probation_is_turned_off_by_either_of_two_settings() -> None:
    assert read(BOOTSTRAP_CLEARANCE_PERIOD_MS="5000").probation_ms == 5000
    assert read(BOOTSTRAP_CLEARANCE_PERIOD_MS="0").probation_ms == 0
    both = {"BOOTSTRAP_CLEARANCE_PERIOD_MS": "5000", "MM_FAILFAST_UPGRADE_ENABLED": "false"}
    assert read(**both).probation_ms == 0
    with pytest.raises(ConfigError, match="an integer from 0"):
        read(BOOTSTRAP_CLEARANCE_PERIOD_MS="soon")


def test_a_config_made_by_hand_has_the_defaults_of_an_empty_environment() -> None:
    by_hand = Config(service_name="modelmesh", kv_store="memory", instance_id=InstanceId("one"))
    assert by_hand == read(MM_INSTANCE_ID="one")


def test_every_setting_arrives() -> None:
    config = read(
        MM_SERVICE_NAME="cluster",
        MM_KVSTORE_PREFIX="mm",
        KV_READ_ONLY="true",
        MM_BIND_HOST="127.0.0.1",
        MM_SVC_GRPC_PORT="0",
        MM_PEER_PORT="0",
        MM_LOCATION="node-a",
        MM_ZONE="zone-b",
        MM_LABELS=" mt:sklearn, gpu ,,gpu",
        INTERNAL_GRPC_PORT="9001",
        INTERNAL_SERVING_GRPC_SOCKET_PATH="/run/serving.sock",
        MM_SVC_GRPC_MAX_MSG_SIZE="1000",
        MM_SVC_GRPC_MAX_HEADERS_SIZE="4096",
        MM_MULTI_PARALLELISM="1",
        MM_MAX_MODELS="0",
        MM_LOAD_FAILURE_EXPIRY_TIME_MS="2001",
        MM_MIN_CHURN_AGE_MS="60000",
        MM_EVICTION="Lru",
        MM_MAX_INFLIGHT_PER_MODEL_COPY="-1",
        MM_SCALEUP_RPM_THRESHOLD="10",
        MM_CONC_SCALEUP_BANDWIDTH_PCT="200",
        MM_MIN_SECOND_COPY_AGE_SECS="4",
        MM_MAX_SECOND_COPY_AGE_SECS="10",
        SHUTDOWN_TIMEOUT_MS="90500",
        MM_LOG_EACH_INVOKE="TRUE",
        MM_LOG_LEVEL="Debug",
        MM_LOG_FORMAT="JSON",
        MM_LOG_REQUEST_HEADERS='{"A-Header": "ah", "u-bin": "uh"}',
    )
    assert config.service_name == "cluster"
    assert config.kv_prefix == "mm"
    assert config.kv_read_only
    assert config.bind_host == "127.0.0.1"
    assert (config.grpc_port, config.peer_port) == (0, 0)
    assert (config.location, config.zone) == ("node-a", "zone-b")
    assert config.labels == ("gpu", "mt:sklearn")
    assert config.runtime_endpoints == (TcpEndpoint("localhost", 9001),)
    assert config.runtime_serving_endpoint == UnixEndpoint("/run/serving.sock")
    assert config.message_bytes_max == 1000
    assert config.headers_bytes_max == 4096
    assert config.multi_parallelism == 1
    assert config.models_max == 0
    assert config.failure_rules.expiry_ms == 2001
    assert (config.min_churn_age_ms, config.copy_calls_max) == (60_000, -1)
    assert config.eviction == "lru"
    rules = config.scaling.rules(config, limits_concurrency=True)
    assert (rules.rpm_threshold, rules.bandwidth) == (10, 2.0)
    assert (rules.second_age_min_ms, rules.second_age_max_ms) == (4_000, 10_000)
    assert rules.limits_concurrency
    assert config.shutdown_timeout_s == 90.5
    assert config.logs == LogSettings(
        level="debug",
        is_json=True,
        each_invoke=True,
        request_headers=(("a-header", "ah"), ("u-bin", "uh")),
    )


@pytest.mark.parametrize(
    ("legacy", "field", "value"),
    [("TAS_SERVICE_NAME", "service_name", "old"), ("TAS_SVC_GRPC_PORT", "grpc_port", "9000")],
)
def test_legacy_names_count_when_the_new_one_is_unset(legacy: str, field: str, value: str) -> None:
    assert str(getattr(read(**{legacy: value}), field)) == value
    new = legacy.replace("TAS_", "MM_")
    assert str(getattr(read(**{legacy: value, new: "1234"}), field)) == "1234"


def test_the_window_of_recurring_use_has_two_ends() -> None:
    with pytest.raises(ConfigError, match="MM_MIN_SECOND_COPY_AGE_SECS is 11, which is more than"):
        read(MM_MIN_SECOND_COPY_AGE_SECS="11", MM_MAX_SECOND_COPY_AGE_SECS="10")


class TestErrorsNameVariableValueAndWhatIsAllowed:
    @pytest.mark.parametrize(
        ("name", "value", "allowed"),
        [
            ("MM_SVC_GRPC_PORT", "65536", "0 to 65535"),
            ("MM_SVC_GRPC_PORT", "", "0 to 65535"),
            ("MM_PEER_PORT", "http", "a TCP port; 0 chooses a free one"),
            ("MM_PEER_PORT", "8_080", "a TCP port"),
            ("INTERNAL_GRPC_PORT", "0", "1 to 65535"),
            ("INTERNAL_SERVING_GRPC_PORT", "-1", "1 to 65535"),
            ("INTERNAL_GRPC_SOCKET_PATH", " ", "anything but empty"),
            ("MM_SVC_GRPC_MAX_MSG_SIZE", "16MiB", "1 to 2147483647"),
            ("MM_SVC_GRPC_MAX_HEADERS_SIZE", "10", "1024 to"),
            ("MM_SVC_GRPC_MAX_HEADERS_SIZE", "65537", "1024 to 65536"),
            ("MM_MULTI_PARALLELISM", "0", "1 to"),
            ("MM_MAX_MODELS", "-1", "0 to"),
            ("MM_LOAD_FAILURE_EXPIRY_TIME_MS", "0", "milliseconds"),
            ("SHUTDOWN_TIMEOUT_MS", "30s", "milliseconds"),
            ("KV_READ_ONLY", "yes", "true or false"),
            ("MM_LOG_EACH_INVOKE", "1", "true or false"),
            ("MM_LOG_LEVEL", "loud", "debug or info or warning or error"),
            ("MM_LOG_FORMAT", "xml", "text or json"),
            ("MM_LOG_REQUEST_HEADERS", "{", "a JSON object of headers"),
            ("MM_LOG_REQUEST_HEADERS", "{}", "with 1 to 32 entries; it has 0"),
            ("MM_LOG_REQUEST_HEADERS", '{"a": 1}', "Expected `str`, got `int`"),
            ("MM_LOG_REQUEST_HEADERS", '{"a b": "x"}', '"a b" is no name of a header'),
            ("MM_LOG_REQUEST_HEADERS", '{"a": " "}', '"a" has no name to be logged under'),
            ("MM_DATAPLANE", "rust", "allowed: wire or python"),
            ("MM_SERVICE_NAME", "a/b", 'without "/"'),
            ("MM_KVSTORE_PREFIX", "a b", "without spaces"),
            ("MM_INSTANCE_ID", "a,b", 'without ","'),
            ("MM_INSTANCE_ID", "", "anything but empty"),
            ("MM_ADVERTISE_ADDRESS", "10.0.0.1:8080", "without a port"),
            ("WATSON_SERVICE_ADDRESS", "http://x", "without a port"),
        ],
    )
    def test_wrong_value(self, name: str, value: str, allowed: str) -> None:
        text = error_of(MEMORY | {name: value})
        assert text.startswith(f'{name}="{value}"')
        assert allowed in text

    def test_a_long_value_is_cut(self) -> None:
        assert len(error_of(MEMORY | {"MM_PEER_PORT": "9" * 10_000})) < 300


class TestStore:
    def test_missing(self) -> None:
        assert error_of({}).startswith("KV_STORE is not set; allowed: etcd:")

    @pytest.mark.parametrize(
        "variables",
        [{"KV_STORE": "zookeeper:zk:2181/chroot"}, {"ZOOKEEPER": "zk:2181"}],
    )
    def test_zookeeper_is_refused_in_one_line(self, variables: dict[str, str]) -> None:
        text = error_of(variables)
        assert "ZooKeeper is not supported" in text
        assert "\n" not in text

    @pytest.mark.parametrize("value", ["", "etcd:", "redis:x", "etcd", "memory:x"])
    def test_wrong(self, value: str) -> None:
        assert "allowed: etcd:<JSON file or host:port" in error_of({"KV_STORE": value})

    @pytest.mark.parametrize("kind", ["memory", "embedded"])
    def test_alone_needs_no_service_name(self, kind: str) -> None:
        config = Config.from_environment({"KV_STORE": kind})
        assert config.service_name == "modelmesh"
        assert config.advertise_host == "127.0.0.1"
        assert config.warnings == ()

    def test_a_cluster_needs_a_service_name(self) -> None:
        assert error_of({"KV_STORE": "etcd:x"}).startswith("MM_SERVICE_NAME is not set")

    def test_what_may_be_a_secret_is_never_shown(self) -> None:
        secret = "etcd:http://root:hunter2@host:2379"
        assert "hunter2" not in repr(Config.from_environment(ETCD | {"KV_STORE": secret}))
        assert "hunter2" not in error_of({"KV_STORE": "etcdd:http://root:hunter2@host"})


class TestIdentity:
    def test_the_end_of_the_pod_name(self) -> None:
        config = read(WKUBE_POD_NAME="modelmesh-serving-mlserver-7f9d6c-x2x9z")
        assert config.instance_id == "7f9d6c-x2x9z"

    def test_an_explicit_id_wins(self) -> None:
        assert read(WKUBE_POD_NAME="pod", MM_INSTANCE_ID="mine").instance_id == "mine"

    def test_made_up_ids_differ(self) -> None:
        first, second = read().instance_id, read().instance_id
        assert first != second
        assert len(first) == 12

    @pytest.mark.parametrize("missing", ["WKUBE_POD_NAME", "WKUBE_POD_IPADDR"])
    def test_kubernetes_must_tell_name_and_address(self, missing: str) -> None:
        pod = {
            "KUBERNETES_SERVICE_HOST": "10.0.0.1",
            "WKUBE_POD_NAME": "pod-1",
            "WKUBE_POD_IPADDR": "10.1.1.1",
        }
        assert Config.from_environment(MEMORY | pod).advertise_host == "10.1.1.1"
        del pod[missing]
        assert error_of(MEMORY | pod).startswith(f"{missing} is not set; in Kubernetes")

    def test_order_of_addresses(self) -> None:
        assert read(WKUBE_POD_IPADDR="a", WATSON_SERVICE_ADDRESS="b").advertise_host == "b"
        assert read(WATSON_SERVICE_ADDRESS="b", MM_ADVERTISE_ADDRESS="c").advertise_host == "c"
        assert read(MM_ADVERTISE_ADDRESS="10.0.0.1").advertise_host == "10.0.0.1"

    @pytest.mark.parametrize("address", ["fd00::1", "[fd00::1]"])
    def test_a_port_can_follow_an_address_of_ipv6(self, address: str) -> None:
        assert read(WKUBE_POD_IPADDR=address).advertise_host == "[fd00::1]"

    def test_a_cluster_on_loopback_is_said(self) -> None:
        variables = {k: v for k, v in ETCD.items() if k != "MM_ADVERTISE_ADDRESS"}
        (warning,) = Config.from_environment(variables).warnings
        assert "MM_ADVERTISE_ADDRESS is not set" in warning


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("INTERNAL_GRPC_PORT", "INTERNAL_GRPC_SOCKET_PATH"),
        ("INTERNAL_SERVING_GRPC_PORT", "INTERNAL_SERVING_GRPC_SOCKET_PATH"),
        ("MM_DATAPLANE_CONFIG", "MM_DATAPLANE_CONFIG_PATH"),
    ],
)
def test_settings_that_exclude_each_other(first: str, second: str) -> None:
    text = error_of(MEMORY | {first: "8085", second: "/x"})
    assert text.startswith(f"{first} and {second} are both set")


def test_both_listeners_on_one_port() -> None:
    text = error_of(MEMORY | {"MM_SVC_GRPC_PORT": "8080"})
    assert text == "MM_SVC_GRPC_PORT and MM_PEER_PORT are both 8080; they must differ"


class TestDataplaneConfig:
    JSON = (
        '{"rpcConfigs": {"tensorflow.serving.PredictionService/Predict":'
        ' {"idExtractionPath": [1, 1], "vModelId": true}}, "allowOtherRpcs": true}'
    )

    def test_literal(self) -> None:
        config = read(MM_DATAPLANE_CONFIG=self.JSON)
        rpc = config.dataplane_config.rpc("/tensorflow.serving.PredictionService/Predict")
        assert rpc == RpcConfig(id_extraction_path=(1, 1), is_vmodel_id=True)
        assert config.dataplane_config.rpc("/other.Service/Method") == RpcConfig()

    def test_the_file_has_to_be_there(self, tmp_path: Path) -> None:
        file = tmp_path / "dataplane.json"
        assert "a file that exists" in error_of(MEMORY | {"MM_DATAPLANE_CONFIG_PATH": str(file)})
        file.write_text("whatever; it is read later")
        config = read(MM_DATAPLANE_CONFIG_PATH=str(file))
        assert config.dataplane_config_path == str(file)
        assert config.dataplane_config == DataplaneConfig()
        both = {"MM_DATAPLANE_CONFIG": "{}", "MM_DATAPLANE_CONFIG_PATH": str(file)}
        assert "MM_DATAPLANE_CONFIG and MM_DATAPLANE_CONFIG_PATH" in error_of(MEMORY | both)

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("", "anything but empty"),
            ("{", "Input data was truncated"),
            ('{"rpcConfig": {}}', "unknown field `rpcConfig`"),
            ('{\n "rpcConfigs": {]', "strings (line 2, column 17)"),
            ('{"rpcConfigs": {"a.B/C": {"vmodelId": true}}}', '"a.B/C": Object contains unknown'),
            ('{"rpcConfigs": {"/a.B/C": {}}}', '"/a.B/C" is not of the form'),
            ('{"rpcConfigs": {"a.B/C": {"idExtractionPath": [0]}}}', "0 is not a protobuf field"),
            ('{"rpcConfigs": {"a.B/C": {"idExtractionPath": ["x"]}}}', "Expected `int`"),
            (
                json.dumps({"rpcConfigs": {"a.B/C": {"idExtractionPath": [1] * 101}}}),
                '"a.B/C": a path has at most 100 field numbers',
            ),
            ('{"allowOtherRpcs": "no"}', "Expected `bool`"),
            ('{"rpcConfigs": {"a.B/C": {}, "a.B/C": {}}}', '"a.B/C" is there twice'),
            ('{"allowOtherRpcs": true, "allowOtherRpcs": true}', '"allowOtherRpcs" is there twice'),
        ],
    )
    def test_wrong(self, text: str, complaint: str) -> None:
        message = error_of(MEMORY | {"MM_DATAPLANE_CONFIG": text})
        assert message.startswith("MM_DATAPLANE_CONFIG=")
        assert complaint in message


def test_odd_variables_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    config = read(
        MM_SEND_DEST_ID="true",
        MM_TYPO="1",
        MM_TABLE="",
        OTHER="1",
    )
    config.log_warnings(logging.getLogger("test"))
    assert [record.message for record in caplog.records] == [
        "has no meaning here, and is ignored: MM_SEND_DEST_ID",
        "unknown, and ignored (misspelt?): MM_TYPO",
    ]


def test_no_variable_is_on_two_lists() -> None:
    names = ELSEWHERE + MEANINGLESS
    assert len(set(names)) == len(names)


class TestLimits:
    def test_they_are_positive_and_frozen(self) -> None:
        limits = Limits()
        for field in dataclasses.fields(limits):
            assert getattr(limits, field.name) > 0, field.name
        with pytest.raises(dataclasses.FrozenInstanceError):
            limits.lease_ttl_s = 3  # type: ignore[misc]

    def test_they_fit_together(self) -> None:
        limits = Limits()
        # A silent store is found out, and its channel replaced, before the lease runs out.
        assert limits.store_silence_max_s + 2 * limits.store_timeout_s < limits.lease_ttl_s
        assert limits.publish_gap_s < limits.publish_interval_s
        assert limits.store_start_timeout_s < limits.runtime_start_timeout_s
        # Copies of a vanished instance outlive its lease by far.
        assert limits.gone_after_s > 10 * limits.lease_ttl_s


# --- type constraints ---------------------------------------------------------------------------


def test_type_constraints_are_read_from_a_variable() -> None:
    config = read(MM_TYPE_CONSTRAINTS='{"t": {"required": ["b", "a"]}}', MM_LABELS="a")
    assert config.type_constraints.required("t") == ("a", "b")
    assert config.type_constraints_path == ""
    assert config.warnings == ()


def test_the_file_of_type_constraints_has_to_be_there(tmp_path: Path) -> None:
    path = tmp_path / "constraints"
    assert "a file that exists" in error_of(MEMORY | {"MM_TYPE_CONSTRAINTS_PATH": str(path)})
    path.write_text("not JSON, but that may be put right")
    config = read(MM_TYPE_CONSTRAINTS_PATH=str(path))
    assert config.type_constraints_path == str(path)
    assert len(config.type_constraints) == 0


def test_wrong_type_constraints_are_named() -> None:
    error = error_of(MEMORY | {"MM_TYPE_CONSTRAINTS": '{"t": {"required": 1}}'})
    assert "MM_TYPE_CONSTRAINTS=" in error
    assert '"t": Expected `array | null`, got `int` - at `$.required`' in error
    both = {"MM_TYPE_CONSTRAINTS": "{}", "MM_TYPE_CONSTRAINTS_PATH": "/x"}
    assert "MM_TYPE_CONSTRAINTS and MM_TYPE_CONSTRAINTS_PATH" in error_of(MEMORY | both)


def test_labels_without_constraints_are_worth_a_warning() -> None:
    (warning,) = read(MM_LABELS="gpu").warnings
    assert "MM_LABELS is set, but no type constraints" in warning


class TestStaticModels:
    JSON = '[{"modelId": "m", "modelInfo": {"type": "t", "key": "secret"}}]'

    def test_from_a_variable(self) -> None:
        for name in ("MM_AUTO_REGISTER_MODELS", "MM_AUTO_REGISTER_MODEL"):
            config = read(**{name: self.JSON})
            assert [each.model_id for each in config.static_models] == ["m"]
            assert config.warnings == ()
        assert read(MM_AUTO_REGISTER_MODELS="").static_models == ()

    def test_the_newer_name_counts(self) -> None:
        config = read(MM_AUTO_REGISTER_MODELS=self.JSON, MM_AUTO_REGISTER_MODEL="[]")
        assert len(config.static_models) == 1

    def test_the_file_has_to_be_there(self, tmp_path: Path) -> None:
        path = tmp_path / "models"
        for name in ("MM_AUTO_REGISTER_MODEL_PATH", "MM_AUTO_REGISTER_MODELS_PATH"):
            assert "a file that exists" in error_of(MEMORY | {name: str(path)})
        path.write_text("")
        both = read(MM_AUTO_REGISTER_MODEL_PATH=str(path), MM_AUTO_REGISTER_MODELS=self.JSON)
        assert both.static_models_path == str(path)
        assert len(both.static_models) == 1

    def test_an_error_names_the_entry_and_no_key(self) -> None:
        error = error_of(MEMORY | {"MM_AUTO_REGISTER_MODELS": self.JSON.replace('"t"', "1")})
        assert error.startswith("MM_AUTO_REGISTER_MODELS is not valid: entry 1 of MM_AUTO_REGIS")
        assert '(model "m")' in error
        assert "secret" not in error
