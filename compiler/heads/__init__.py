"""What each head does: facts measured on the attention sites of a raised model, and recipes written from them."""
