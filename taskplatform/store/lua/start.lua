-- Lets a delivery run, if it is the job's current one: queued → assigned → running. Then releases what there is room for.
-- ARGV[1] now   ARGV[2] job id   ARGV[3] delivery   ARGV[4] worker   ARGV[5] how long ago the message arrived, in ms
-- ARGV[6] a mark of this call: one that is sent again, because its answer was lost, is answered as the first time
-- ARGV[7] the version of the definition that the worker will run ('' not known)
-- Returns {'run', attempt, losses, execute_after, params, attempts that do not count, now} or {why not}: unknown, stale, early, held, limited or the job's state.

local now, id, delivery, worker = clock(ARGV[1]), ARGV[2], tonumber(ARGV[3]), ARGV[4]
local job = load_job(id)
if not job then return { 'unknown' } end
if job.delivery ~= delivery then return { 'stale' } end
local function go(attempt)
  return { 'run', attempt, job.losses, job.after, job.params or '', tonumber(job.budget or '0'), now }
end
if job.state == 'running' and job.mark == ARGV[6] then return go(job.attempt) end
if job.state ~= 'queued' then return { job.state } end
if tonumber(job.after) > now then
  -- the clock was set back since the release
  give_back(id, job, job.attempt > 0 and 'retrying' or 'pending', now, tonumber(job.after), worker, 'given back: it is early', '')
  return { 'early' }
end
local definition = parts(id)
local known = call('HMGET', K.definition .. definition, 'priority', 'version')
if not known[1] then
  -- its limits are not known any more, nor its host
  conclude(id, job, 'rejected', now, worker, 'definition ' .. definition .. ' does not exist any more', '')
  release(now, 10)
  return { 'rejected' }
end
local kept, probes = kept_from_host(id, delivery, now)
if kept then
  -- released before its host was held back: it keeps its place, and has not been tried
  give_back(id, job, job.attempt > 0 and 'retrying' or 'pending', now, tonumber(job.after), worker, 'given back: ' .. kept, '')
  release(now, 10)
  return { 'held' }
end
if not have_tokens(definition, now) then
  -- a limit was lowered since the release, or another server does not know what was started before
  give_back(id, job, job.attempt > 0 and 'retrying' or 'pending', now, tonumber(job.after), worker, 'given back: its limit has no place for it now', '')
  release(now, 10)
  return { 'limited' }
end
local attempt, version, started = job.attempt + 1, ARGV[7], 'started'
if version ~= '' and known[2] and known[2] ~= version then
  -- a deployment is under way, or this worker was left out of one
  started = 'started by version ' .. version .. ' of its definition, published is ' .. known[2]
end
if probes then started = started .. ', to probe its host' end
local released_at = tonumber(call('ZSCORE', K.queued .. (job.queue or job.priority), id) or now)
local received_at = math.max(now - tonumber(ARGV[5]), released_at)
if delivery > 1 then
  -- the late result of an earlier delivery may have been noted since
  local last = call('LINDEX', K.history .. id, -1)
  received_at = math.max(received_at, tonumber(string.match(last or '', '^%[(%d+)') or 0))
end
-- in this state nothing else finds the job, so only its history says that it was; as many enter it as start
remember(id, math.min(now, received_at), 'queued', 'assigned', attempt, worker, 'received', '')
move(id, 'assigned', 'running', now, attempt, worker, started, '')
call('HSET', K.job .. id, 'attempt', attempt, 'worker', worker, 'started', text(now), 'mark', ARGV[6], 'version', version)
if job.refusals then call('HDEL', K.job .. id, 'refusals') end
call('ZREM', K.queued .. (job.queue or job.priority), id)
each_bucket(definition, now, spend)
observe_lag(job.priority, job.after, now)
call('ZADD', K.active, text(now), id)
call('SADD', K.worker_jobs .. worker, id)
-- a worker that was declared lost and came back counts again
call('ZADD', K.workers, 'NX', text(now), worker)
release(now, 10)
return go(attempt)
