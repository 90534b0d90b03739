"""The load generator: corpus -> arrivals -> client -> record -> parquet -> report."""
