"""The pages that people see: the customer portal and the checkout, as plain as can be."""

from __future__ import annotations

from html import escape

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from tallystick.dev.fake_stripe import payments
from tallystick.dev.fake_stripe.account import Account
from tallystick.dev.fake_stripe.errors import StripeError
from tallystick.dev.fake_stripe.events import changing
from tallystick.dev.fake_stripe.objects.sessions import OPEN_SECONDS, complete_checkout
from tallystick.dev.fake_stripe.state import Object

# Once opened, Stripe keeps a portal session for an hour of inactivity; the fake for an hour from its making.
USE_SECONDS = 3600

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 40rem; margin: 3rem auto; padding: 0 1rem; color: #1a1f36 }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .4rem; border-bottom: 1px solid #ddd }
button { font: inherit; padding: .6rem 1.2rem; border: 0; border-radius: 6px; background: #4a3fd6; color: #fff }
.note { background: #fff6d6; padding: .5rem 1rem; border-radius: 6px }
"""


def page_routes(account: Account) -> list[Route]:
    """The routes of the two pages."""

    async def portal(request: Request) -> Response:
        session = _portal_session(account, request.path_params["secret"])
        if session is None:
            return _page("Link expired", "<p>This portal link has expired. Ask for a new one.</p>", status=410)
        if request.method == "POST":
            _pay_everything(account, session)
            # A reload must not pay again.
            return RedirectResponse(request.url.path, status_code=303)
        return _portal_page(account, session)

    async def checkout(request: Request) -> Response:
        session = account.state.get("checkout.session", request.path_params["id"])
        if session is None:
            return _page("Not found", "<p>There is no such checkout session.</p>", status=404)
        if request.method == "POST":
            try:
                complete_checkout(account, session)
            except StripeError as error:
                return _page("Not completed", f"<p>{escape(str(error))}</p>", status=error.status)
            account.note()
            return RedirectResponse(session["success_url"] or request.url.path, status_code=303)
        return _checkout_page(session)

    return [
        Route("/p/session/{secret}", portal, methods=["GET", "POST"]),
        Route("/c/pay/{id}", checkout, methods=["GET", "POST"]),
    ]


def _portal_session(account: Account, secret: str) -> Object | None:
    known = account.state.get("_portal_secret", secret)
    session = account.state.get("billing_portal.session", known["session"]) if known else None
    if session is None:
        return None
    age = account.now() - session["created"]
    if age > (USE_SECONDS if session["_opened"] else OPEN_SECONDS):
        return None
    if not session["_opened"]:
        session["_opened"] = True
        account.state.put(session)
    return session


def _open_invoices(account: Account, customer: Object) -> list[Object]:
    invoices = account.state.where("invoice", "customer", customer["id"])
    return [invoice for invoice in invoices if invoice["status"] == "open"]


def _pay_everything(account: Account, session: Object) -> None:
    """Gives the customer a card that works, as his default, and pays what is open with it."""
    customer = account.state.get("customer", session["customer"])
    if customer is None or customer.get("deleted"):
        return
    card = payments.attached(account, customer, "pm_card_visa", "payment_method")
    with changing(account, customer):
        customer["invoice_settings"]["default_payment_method"] = card["id"]
    for subscription in account.state.where("subscription", "customer", customer["id"]):
        if subscription["default_payment_method"] is not None and subscription["status"] != "canceled":
            with changing(account, subscription):
                subscription["default_payment_method"] = card["id"]
    for invoice in _open_invoices(account, customer):
        payments.attempt(account, invoice, card)
    account.note()


def _portal_page(account: Account, session: Object) -> Response:
    customer = account.state.get("customer", session["customer"])
    if customer is None or customer.get("deleted"):
        return _page("Not found", "<p>This customer was deleted.</p>", status=404)
    rows = "".join(
        f"<tr><td>{escape(invoice['number'] or '')}</td><td>{_money(invoice)}</td></tr>"
        for invoice in _open_invoices(account, customer)
    )
    invoices = (
        f"<table><tr><th>Open invoice</th><th>Amount</th></tr>{rows}</table>" if rows else "<p>Nothing is open.</p>"
    )
    card = account.state.get("payment_method", customer["invoice_settings"]["default_payment_method"] or "")
    card_line = f"{card['card']['brand']} ending in {card['card']['last4']}" if card else "none"
    back = session["return_url"]
    link = f'<p><a href="{escape(back)}">Back</a></p>' if back and back.startswith(("http://", "https://")) else ""
    button = "Use a working card and pay what is open" if rows else "Use a working card"
    body = (
        f"<p>Customer: {escape(customer['name'] or customer['email'] or customer['id'])}</p>"
        f"<p>Default card: {escape(card_line)}</p>{invoices}"
        f'<form method="post"><p><button>{button}</button></p></form>{link}'
    )
    return _page("Customer portal", body)


def _checkout_page(session: Object) -> Response:
    if session["status"] != "open":
        return _page("Checkout", f"<p>This session is {escape(session['status'])}.</p>")
    items = "".join(f"<li>{escape(str(item['price']))}</li>" for item in session["_line_items"])
    form = '<form method="post"><p><button>Subscribe with a working card</button></p></form>'
    return _page("Checkout", f"<ul>{items}</ul>{form}")


def _money(invoice: Object) -> str:
    units, cents = divmod(invoice["amount_remaining"], 100)
    return f"{units}.{cents:02d} {escape(invoice['currency'].upper())}"


def _page(title: str, body: str, status: int = 200) -> HTMLResponse:
    note = '<p class="note">This is the fake Stripe. No money moves here.</p>'
    html = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"</head><body><h1>{title}</h1>{note}{body}</body></html>"
    )
    # Whoever has the address is signed in: it must not leave in a Referer, nor stay in a cache.
    return HTMLResponse(html, status, {"Referrer-Policy": "no-referrer", "Cache-Control": "no-store"})
