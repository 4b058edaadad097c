"""A Stripe to develop against: a real HTTP server with its own state, its own clock and Stripe's strictness.

`app.create_fake_stripe` makes the ASGI application, `server.serve_fake_stripe` runs it. docs/fake-stripe.md says what
it does and what it leaves out.
"""
