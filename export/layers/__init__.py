"""Networks that more than one family is made of. A family imports these, never another family."""
