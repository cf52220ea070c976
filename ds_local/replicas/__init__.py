"""The data-parallel axis: replicas together or apart, subnets, weights copied into heads."""
