from sparsefx.report.explain import explain

__all__ = ["explain"]
