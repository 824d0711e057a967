"""One file a metric, named as `--metric` and gates name it; `PLUGIN` is the metric itself (diffkiln.plugins)."""
