"""Models: load one by name, bind its layout, generate from it."""
