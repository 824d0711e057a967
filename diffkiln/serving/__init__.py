"""Serving: one ASGI application over a bundle, in one process or on Ray Serve.

`app.py` has the routes, `service.py` what answers them. A request becomes an `Order`, an order becomes rows (one prompt
each), and `worker.py` runs rows of several orders in one call where a variant has the batch for it.
"""
