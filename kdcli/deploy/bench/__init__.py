"""Size, latency, throughput, memory and accuracy of models against their teacher, on this CPU."""

from kdcli.deploy.bench.benchmark import bench
from kdcli.deploy.bench.measurements import BenchResult, Row, deployed, to_csv, to_markdown
