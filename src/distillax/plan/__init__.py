"""`distillax plan`: what a recipe would cost on devices that are not here, before they are paid for."""
