"""Named data sets, one module each; `kdcli.data.datasets.discover` imports them all."""
