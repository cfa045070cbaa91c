"""Settings of the command line and of recipe files: every default, bound and help text is defined here.

Each field is one `setting(default, help text, panel, …)`.
"""

from kdcli.base.config.commands import (
    BenchConfig,
    CleanConfig,
    CompareConfig,
    ConvertConfig,
    DataConfig,
    DemoConfig,
    DownloadConfig,
    ExportConfig,
    InfoConfig,
    LogitsConfig,
    PredictConfig,
    ReportConfig,
    ReproduceConfig,
    TestConfig,
    ValidateConfig,
)
from kdcli.base.config.settings import (
    DATA,
    METHOD,
    NO_ASSUMPTIONS,
    OPTIMISER,
    RUN,
    DataSettings,
    InputSettings,
    ModelDataSettings,
    Settings,
    TeacherInputs,
    TeacherInputSettings,
    make,
    option_flag,
    shell_command,
)
from kdcli.base.config.train import AUGMENT_STEPS, Ramp, TrainSettings, augment_steps
