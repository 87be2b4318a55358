"""The core: layers, the residual, what a model holds, surgery, the fold. Needs torch alone."""
