// On a real server: MANYHATS_GRPC and MANYHATS_HTTP are its addresses, MANYHATS_TOKEN and MANYHATS_CA what it requires.
// MANYHATS_ADAPTER is an adapter's directory for its base, and the task `sql` is served.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { readFileSync } from "node:fs";
import { after, test } from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { create } from "@bufbuild/protobuf";
import {
  AdapterMethod,
  AdapterState,
  Code,
  ConnectError,
  failureOf,
  FinishReason,
  GenerateRequestSchema,
  ManyhatsClient,
} from "../src/index.js";

const { MANYHATS_GRPC: url, MANYHATS_TOKEN: token, MANYHATS_CA: caFile, MANYHATS_ADAPTER: adapter = "" } = process.env;
const skip = url === undefined && "needs a server";
const client = new ManyhatsClient(url, {
  ...(token === undefined ? {} : { token }),
  ...(caFile === undefined ? {} : { ca: readFileSync(caFile) }),
});
after(() => client.close());

async function collect<T>(items: AsyncIterable<T>): Promise<T[]> {
  const all: T[] = [];
  for await (const item of items) {
    all.push(item);
  }
  return all;
}

async function names(taskId: string): Promise<string[]> {
  return (await collect(client.list(taskId))).map((each) => `${each.taskId}@${each.version}`);
}

test("the server", { skip }, async () => {
  const info = await client.server.getServerInfo({});
  assert.equal(info.quantization, "nf4");
  assert.ok(info.services.includes("manyhats.v1.GenerationService"));
});

test("the life of a task", { skip }, async () => {
  const told: [number, number][] = [];
  const progress = (sent: number, total: number) => told.push([sent, total]);
  const { adapter: first, created } = await client.upload("from-node", adapter, { labels: { team: "web" }, progress });
  assert.ok(created && first !== undefined);
  assert.equal(first.method, AdapterMethod.LORA);
  assert.equal(first.state, AdapterState.ACTIVE);
  assert.deepEqual(first.labels, { team: "web" });
  assert.ok(first.sizeBytes > 0n && first.effect !== undefined && first.effect > 0);
  const [sent, total] = told.at(-1) ?? [];
  assert.ok(total !== undefined && sent === total && total > 100_000);

  assert.equal((await client.upload("from-node", adapter, { labels: { team: "web" } })).created, false);
  assert.deepEqual(await names("from-node"), ["from-node@1"]);
  assert.ok((await names("")).includes("sql@1"));
  assert.equal((await client.adapters.pinAdapter({ taskId: "from-node" })).adapter?.pinned, true);
  assert.equal((await client.adapters.unpinAdapter({ taskId: "from-node" })).adapter?.pinned, false);
  assert.equal((await client.adapters.activateAdapter({ taskId: "from-node@1" })).adapter?.version, 1);
  const answer = await client.generation.generate({ taskId: "from-node", prompt: { case: "text", value: "Once" } });
  assert.equal(answer.adapter?.digest, first.digest);
  await client.adapters.deleteAdapter({ taskId: "from-node", force: true });
  assert.deepEqual(await names("from-node"), []);
});

test("what an upload is refused for", { skip }, async () => {
  const error: unknown = await client
    .upload("from-node", adapter, { expectedDigest: `sha256:${"0".repeat(64)}` })
    .catch((caught: unknown) => caught);
  assert.equal(failureOf(error).reason, "DIGEST_MISMATCH");
  const refused: unknown = await client.upload("No Task", adapter).catch((caught: unknown) => caught);
  assert.ok(refused instanceof ConnectError);
  assert.equal(refused.code, Code.InvalidArgument);
  assert.ok("task_id" in failureOf(refused).violations);
  await assert.rejects(client.upload("from-node", import.meta.dirname), /must have adapter_config.json/);
  assert.deepEqual(await names("from-node"), []);
});

test("scores", { skip }, async () => {
  const texts = [" Paris", " Rome"];
  const scores = await client.score("The capital of France is", texts);
  assert.ok(scores[0] && scores[1] && scores[0].logprob > scores[1].logprob && scores[0].logprob < 0);
  const { ids } = await client.generation.tokenize({ prompt: { case: "text", value: "The capital of France is" } });
  const [again] = await client.score(ids, texts);
  assert.equal(again?.logprob, scores[0].logprob);
  const [asChat] = await client.score([{ role: "user", content: "Hello" }], texts, { taskId: "sql" });
  assert.ok(asChat && asChat.logprob < 0 && asChat.numTokens === scores[0].numTokens);
});

test("a stream's pieces are the whole answer", { skip }, async () => {
  const request = create(GenerateRequestSchema, {
    taskId: "sql",
    prompt: { case: "chat", value: { messages: [{ role: "user", content: "How many customers are there?" }] } },
    sampling: { temperature: 1, seed: 7n },
    stopping: { maxNewTokens: 24 },
  });
  const whole = await client.generation.generate(request);
  const pieces = await collect(client.generation.generateStream(request));
  assert.equal(pieces.map((piece) => piece.text).join(""), whole.text);
  assert.notEqual(whole.finishReason, FinishReason.UNSPECIFIED);
  assert.equal(whole.adapter?.version, 1);
});

test("errors and deadlines", { skip }, async () => {
  const error = await client.score("a", ["b"], { taskId: "none" }).catch((caught: unknown) => caught);
  assert.ok(error instanceof ConnectError);
  assert.equal(error.code, Code.NotFound);
  assert.equal(failureOf(error).reason, "TASK_NOT_FOUND");
  const long = { prompt: { case: "text", value: "Once" }, stopping: { maxNewTokens: 2000, ignoreEos: true } } as const;
  await assert.rejects(client.generation.generate(long, { timeoutMs: 100 }), { code: Code.DeadlineExceeded });
});

test("a wrong token", { skip: skip || (token === undefined && "needs a server with tokens") }, async () => {
  const stranger = new ManyhatsClient(url, { token: "wrong", ...(caFile && { ca: readFileSync(caFile) }) });
  await assert.rejects(stranger.server.getServerInfo({}), { code: Code.Unauthenticated });
  stranger.close();
});

test("the example with the openai package", { skip }, async () => {
  const example = fileURLToPath(new URL("../examples/generate.js", import.meta.url));
  const env = { ...process.env, ...(caFile && { NODE_EXTRA_CA_CERTS: caFile }) };
  const { stdout } = await promisify(execFile)(process.execPath, [example], { env });
  const [whole, streamed] = stdout.trim().split("\n");
  assert.match(whole ?? "", /SELECT/i);
  assert.ok(streamed !== undefined);
});
