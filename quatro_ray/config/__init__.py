"""The configuration: one strict schema, one docstring per field, units in the names.

Importing this package loads neither torch nor ray nor vllm. Unknown keys are refused, and rules between fields are
checked before any process starts.
"""

from quatro_ray.config.base import Section
from quatro_ray.config.data import (
    ChainSumSourceConfig,
    DataConfig,
    EvalSourceConfig,
    FilterConfig,
    HuggingFaceSourceConfig,
    JsonLinesSourceConfig,
    ParquetSourceConfig,
    ReasoningGymSourceConfig,
    SourceConfig,
    TrainShareSourceConfig,
    VerifiersSourceConfig,
)
from quatro_ray.config.environments import EnvironmentConfig
from quatro_ray.config.generator import GeneratorConfig
from quatro_ray.config.learner import AggregationMode, LearnerConfig, StepControlConfig
from quatro_ray.config.load import dump_config, load_config
from quatro_ray.config.lora import LoraConfig
from quatro_ray.config.model import (
    ModelConfig,
    PretrainedModelConfig,
    TinyModelConfig,
    WarmupConfig,
)
from quatro_ray.config.objectives import (
    CispoConfig,
    DapoConfig,
    DecoupledPpoConfig,
    DppoConfig,
    DrGrpoConfig,
    DrpoConfig,
    GrpoConfig,
    GspoConfig,
    ImportanceConfig,
    Level,
    M2poConfig,
    MisGrpoConfig,
    ObjectiveConfig,
    QuatroConfig,
    ReinforceConfig,
    SapoConfig,
    TisGrpoConfig,
    UserObjectiveConfig,
)
from quatro_ray.config.paths import FunctionPath
from quatro_ray.config.replay import ReplayConfig
from quatro_ray.config.rewards import (
    CodeRewardConfig,
    EnvironmentRewardConfig,
    ExactRewardConfig,
    Extraction,
    FormatRewardConfig,
    HttpRewardConfig,
    IntegerRewardConfig,
    LengthRewardConfig,
    MathRewardConfig,
    ModelRewardConfig,
    PythonRewardConfig,
    ReasoningGymRewardConfig,
    RegexRewardConfig,
    RewardConfig,
    SandboxFusionRewardConfig,
    SandboxLimits,
)
from quatro_ray.config.run import (
    CheckpointConfig,
    ClusterConfig,
    EvaluationConfig,
    RunConfig,
    TelemetryConfig,
)
from quatro_ray.config.schema import Config
from quatro_ray.config.verifier import VerifierConfig
from quatro_ray.config.weight_sync import WeightSyncConfig

__all__ = [
    "AggregationMode",
    "ChainSumSourceConfig",
    "CheckpointConfig",
    "CispoConfig",
    "ClusterConfig",
    "CodeRewardConfig",
    "Config",
    "DapoConfig",
    "DataConfig",
    "DecoupledPpoConfig",
    "DppoConfig",
    "DrGrpoConfig",
    "DrpoConfig",
    "EnvironmentConfig",
    "EnvironmentRewardConfig",
    "EvalSourceConfig",
    "EvaluationConfig",
    "ExactRewardConfig",
    "Extraction",
    "FilterConfig",
    "FormatRewardConfig",
    "FunctionPath",
    "GeneratorConfig",
    "GrpoConfig",
    "GspoConfig",
    "HttpRewardConfig",
    "HuggingFaceSourceConfig",
    "ImportanceConfig",
    "IntegerRewardConfig",
    "JsonLinesSourceConfig",
    "LearnerConfig",
    "LengthRewardConfig",
    "Level",
    "LoraConfig",
    "M2poConfig",
    "MathRewardConfig",
    "MisGrpoConfig",
    "ModelConfig",
    "ModelRewardConfig",
    "ObjectiveConfig",
    "ParquetSourceConfig",
    "PretrainedModelConfig",
    "PythonRewardConfig",
    "QuatroConfig",
    "ReasoningGymRewardConfig",
    "ReasoningGymSourceConfig",
    "RegexRewardConfig",
    "ReinforceConfig",
    "ReplayConfig",
    "RewardConfig",
    "RunConfig",
    "SandboxFusionRewardConfig",
    "SandboxLimits",
    "SapoConfig",
    "Section",
    "SourceConfig",
    "StepControlConfig",
    "TelemetryConfig",
    "TinyModelConfig",
    "TisGrpoConfig",
    "TrainShareSourceConfig",
    "UserObjectiveConfig",
    "VerifierConfig",
    "VerifiersSourceConfig",
    "WarmupConfig",
    "WeightSyncConfig",
    "dump_config",
    "load_config",
]
