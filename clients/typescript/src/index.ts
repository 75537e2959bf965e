/**
 * The client of manyhats for Node: tasks and their versions, typed scores and everything else of the gRPC API.
 *
 * ```ts
 * const client = new ManyhatsClient("http://127.0.0.1:50051");
 * await client.upload("sql", "./sql");
 * const [good, bad] = await client.score("A fine film.", [" good", " bad"], { taskId: "mood" });
 * client.close();
 * ```
 *
 * For generation, npm's `openai` speaks to the server's HTTP port.
 */

export { ManyhatsClient, type CallOptions, type PromptText } from "./client.js";
export { CredentialsError, type ConnectionOptions } from "./connection.js";
export { failureOf, type Failure } from "./errors.js";
export { type UploadOptions } from "./upload.js";
export { Code, ConnectError } from "@connectrpc/connect";
export * from "./gen/manyhats/v1/adapter_pb.js";
export * from "./gen/manyhats/v1/encoding_pb.js";
export * from "./gen/manyhats/v1/generation_pb.js";
export * from "./gen/manyhats/v1/server_pb.js";
