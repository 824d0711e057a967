"""Adapters at run time: LoRAs that are added to the weights in the store. Engines take weights as inputs, so nothing is
compiled."""
