// Stripe's sync-engine behind the smallest server that Node has: one POST, one event, 200 once it is stored.
// node sync_engine.mjs FOLDER PORT DATABASE_URL WEBHOOK_SECRET, where FOLDER holds node_modules.
import { createServer } from 'node:http'
import { createRequire } from 'node:module'

const [folder, port, databaseUrl, secret] = process.argv.slice(2)
const { StripeSync, runMigrations } = createRequire(`${folder}/`)('@supabase/stripe-sync-engine')

await runMigrations({ databaseUrl, schema: 'stripe' })
const sync = new StripeSync({
  poolConfig: { connectionString: databaseUrl, max: 10 },
  stripeSecretKey: 'sk_test_benchmark',
  stripeWebhookSecret: secret,
  autoExpandLists: false,
  backfillRelatedEntities: false,
})

createServer(async (request, response) => {
  const chunks = []
  for await (const chunk of request) chunks.push(chunk)
  try {
    if (request.method === 'POST') {
      await sync.processWebhook(Buffer.concat(chunks), request.headers['stripe-signature'])
    }
    response.writeHead(200, { 'Content-Type': 'application/json', 'Content-Length': 17 }).end('{"received":true}')
  } catch (error) {
    const body = JSON.stringify({ error: String(error?.message ?? error).slice(0, 300) })
    response.writeHead(500, { 'Content-Length': Buffer.byteLength(body) }).end(body)
  }
}).listen(Number(port), '127.0.0.1')
