"""Operations of the nodes of a `kdcli.models.graph`, with Caffe's exact arithmetic."""
